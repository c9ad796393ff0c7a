"""A state of SlowMo that the inner optimizer loads before it is wrapped: most of it would be lost without a word."""

import pytest
import torch

from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo
from support.models.pytorch import assert_same, net, sgd, train

LOST = r"was loaded into the inner optimizer.*SlowMo\(inner, model, \.\.\.\); optimizer\.load_state_dict\(state\)"


def trained(comm):
    model = net()
    optimizer = SlowMo(sgd(model), model, tau=2, beta=0.5, comm=comm)
    train(model, optimizer, comm.rank, 4)
    return model, optimizer


@pytest.mark.parametrize("loading", [[0, 1], [0], [1]])
def test_it_is_refused_on_every_rank(loading):
    def work(comm):
        _, optimizer = trained(comm)
        model = net()
        inner = sgd(model)
        if comm.rank in loading:
            inner.load_state_dict(optimizer.state_dict())
        SlowMo(inner, model, tau=2, beta=0.5, comm=comm)

    for error in ThreadWorld(2).run(work, return_exceptions=True):
        with pytest.raises(ValueError, match=LOST):
            raise error


def test_a_state_that_went_through_a_plain_training_is_refused_until_the_mark_is_removed(tmp_path):
    _, optimizer = trained(SoloComm())
    model = net()
    plain = sgd(model)
    plain.load_state_dict(optimizer.state_dict())
    train(model, plain, 0, 2)
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    inner = sgd(model)
    inner.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True))
    with pytest.raises(ValueError, match=r"group\.pop\('slowmo', None\)"):
        SlowMo(inner, model, tau=2)
    for group in inner.param_groups:
        group.pop("slowmo", None)
    assert SlowMo(inner, model, tau=2).steps == 0


def test_a_group_added_since_does_not_hide_it():
    _, optimizer = trained(SoloComm())
    model = net()
    inner = sgd(model)
    inner.load_state_dict(optimizer.state_dict())
    weights = inner.param_groups[0]["params"]
    inner.param_groups[0]["params"] = weights[:2]
    inner.add_param_group({"params": weights[2:]})
    with pytest.raises(ValueError, match=LOST):
        SlowMo(inner, model)


def test_the_order_that_the_message_gives_leaves_no_mark():
    _, optimizer = trained(SoloComm())
    state = optimizer.state_dict()
    model = net()
    loaded = SlowMo(sgd(model), model, tau=2, beta=0.5)
    loaded.load_state_dict(state)
    assert loaded.steps == 4
    assert_same(loaded.state_dict(), state)  # given as it was
    for each in (optimizer, loaded):
        assert "slowmo" not in each.param_groups[0]
        assert "slowmo" not in each.inner_optimizer.state_dict()["param_groups"][0]


def test_the_inner_optimizers_own_state_may_be_loaded_first():
    def work(comm):
        _, optimizer = trained(comm)
        model = net()
        inner = sgd(model)
        inner.load_state_dict(optimizer.inner_optimizer.state_dict())
        return SlowMo(inner, model, tau=2, comm=comm).steps

    assert ThreadWorld(2).run(work) == [0, 0]


def test_horovods_broadcast_of_the_live_optimizer_leaves_no_mark():
    """It writes to the live param_groups what it finds in those of the state."""
    scope = {"__name__": "horovod.torch.functions"}
    exec("def broadcast_optimizer_state(optimizer): return optimizer.state_dict()", scope)
    _, optimizer = trained(SoloComm())
    state = scope["broadcast_optimizer_state"](optimizer)
    assert "slowmo" in state
    assert "slowmo" not in state["param_groups"][0]
