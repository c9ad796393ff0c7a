"""Values that inner optimizers keep outside of `state` resume bitwise and are reset; numbers that no step can take."""

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.errors import CheckpointError
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.inner_optimizers import Counting, DAdapt, History, NeverLoaded, ScheduleFree
from support.models.pytorch import assert_same, held, net, sgd, train

SGD = partial(torch.optim.SGD, lr=0.1)
KINDS = pytest.mark.parametrize("kind", [ScheduleFree, DAdapt, Counting])


def make(kind, comm, **settings):
    """Wrap the optimizer before train() is called, as the libraries' examples do."""
    model = net()
    inner = kind(model.parameters())
    optimizer = SlowMo(inner, model, comm=comm, **{"tau": 3, **settings})
    if hasattr(inner, "train"):
        inner.train()
    return model, optimizer


def to_bytes(*items):
    file = io.BytesIO()
    torch.save(items, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@KINDS
def test_a_checkpoint_and_a_state_dict_resume_bitwise(kind, tmp_path):
    def work(comm):
        model, optimizer = make(kind, comm)
        train(model, optimizer, comm.rank, 4)
        optimizer.save(tmp_path / "job")
        states = to_bytes(model.state_dict(), optimizer.state_dict())
        train(model, optimizer, comm.rank, 4, first=4)

        other, loaded = make(kind, comm)
        loaded.load(tmp_path / "job")
        loaded.save(tmp_path / "again")
        train(other, loaded, comm.rank, 4, first=4)
        assert_same(held(other), held(model))

        third, restored = make(kind, comm)
        third.load_state_dict(states[0])
        restored.load_state_dict(states[1])
        train(third, restored, comm.rank, 4, first=4)
        assert_same(held(third), held(model))

    ThreadWorld(2).run(work)
    assert (tmp_path / "job").read_bytes() == (tmp_path / "again").read_bytes()


def test_train_after_load_does_not_move_a_schedule_free_model(tmp_path):
    model, optimizer = make(ScheduleFree, SoloComm())
    train(model, optimizer, 0, 4)
    optimizer.save(tmp_path / "job")
    other = net()
    inner = ScheduleFree(other.parameters())
    loaded = SlowMo(inner, other, comm=SoloComm(), tau=3)
    loaded.load(tmp_path / "job")
    inner.train()
    assert_same(held(other), held(model))


@KINDS
def test_a_reset_gives_the_values_from_before_the_first_step(kind):
    def work(comm):
        settings = {"beta": 0.0, "inner_state": "reset"}
        model, optimizer = make(kind, comm, **settings)
        other, fresh = make(kind, comm, **settings)
        train(model, optimizer, comm.rank, 3)
        other.load_state_dict(model.state_dict())
        train(model, optimizer, comm.rank, 2, first=3)
        train(other, fresh, comm.rank, 2, first=3)
        assert_same(held(model), held(other))

    ThreadWorld(2).run(work)


def test_a_reset_leaves_settings_and_a_groups_own_first_value():
    model = net()
    inner = DAdapt([{"params": list(model.parameters()), "d": 1e-4}])
    optimizer = SlowMo(inner, model, comm=SoloComm(), tau=2, inner_state="reset")
    inner.param_groups[0]["note"] = "set later"
    train(model, optimizer, 0, 2)
    assert inner.param_groups[0]["d"] == 1e-4
    assert inner.param_groups[0]["note"] == "set later"


def test_an_optimizer_that_was_trained_before_it_was_wrapped_is_reset_to_its_defaults():
    model = net()
    inner = ScheduleFree(model.parameters())
    inner.train()
    train(model, inner, 0, 3)
    optimizer = SlowMo(inner, model, comm=SoloComm(), tau=2, inner_state="reset")
    train(model, optimizer, 0, 2)
    assert (inner.param_groups[0]["k"], inner.param_groups[0]["weight_sum"]) == (0, 0.0)


def test_a_momentum_that_a_scheduler_cycles_comes_back(tmp_path):
    def begin():
        model = net()
        optimizer = SlowMo(sgd(model), model, comm=SoloComm(), tau=3)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=10)

    model, optimizer, schedule = begin()
    train(model, optimizer, 0, 4, schedule=schedule)
    optimizer.save(tmp_path / "job")
    kept = copy.deepcopy(schedule.state_dict())
    train(model, optimizer, 0, 4, first=4, schedule=schedule)
    other, loaded, schedule = begin()
    schedule.load_state_dict(kept)
    loaded.load(tmp_path / "job")
    train(other, loaded, 0, 4, first=4, schedule=schedule)
    assert_same(held(other), held(model))


def test_a_checkpoint_of_the_start_resets_a_trained_optimizer(tmp_path):
    model, optimizer = make(Counting, SoloComm())
    optimizer.save(tmp_path / "start")
    train(model, optimizer, 0, 4)
    optimizer.load(tmp_path / "start")
    assert "step" not in optimizer.param_groups[0]
    assert optimizer.inner_optimizer.count == 0


def test_values_that_differ_between_workers_are_not_lost_on_another_number_of_them(tmp_path):
    def save(comm):
        model, optimizer = make(DAdapt, comm)
        train(model, optimizer, comm.rank, 3)
        optimizer.save(tmp_path / "job")

    ThreadWorld(2).run(save)
    _, optimizer = make(DAdapt, SoloComm())
    with pytest.raises(CheckpointError, match="each of those has its own inner optimizer state"):
        optimizer.load(tmp_path / "job")


def test_other_groups_are_refused(tmp_path):
    model, optimizer = make(Counting, SoloComm())
    train(model, optimizer, 0, 2)
    optimizer.save(tmp_path / "job")
    model = net()
    inner = Counting([{"params": part.parameters()} for part in (model[0], model[2])])
    optimizer = SlowMo(inner, model, comm=SoloComm(), tau=3)
    with pytest.raises(CheckpointError, match="has 1 parameter groups with values of their own in the checkpoint"):
        optimizer.load(tmp_path / "job")
    assert optimizer.steps == 0


def test_a_value_of_another_type_is_refused_by_name(tmp_path):
    model, optimizer = make(History, SoloComm())
    train(model, optimizer, 0, 1)
    with pytest.raises(CheckpointError, match="History changes 'history' of parameter group 0 in its steps, a list"):
        optimizer.save(tmp_path / "job")
    model, optimizer = make(History, SoloComm(), inner_state="reset")
    with pytest.raises(ValueError, match=r"'history' of parameter group 0 .* which SlowMo can't reset"):
        train(model, optimizer, 0, 1)


def raised(work):
    """Return the errors of two workers."""
    errors = ThreadWorld(2).run(work, return_exceptions=True)
    return [(type(error), str(error)) for error in errors]


def test_a_state_that_can_not_be_sent_or_loaded_is_refused_on_every_rank():
    def unpicklable(comm):
        model = net()
        groups = [{"params": list(model.parameters()), "rule": lambda rate: rate}]
        SlowMo(torch.optim.SGD(groups, lr=0.1), model, comm=comm)

    def never_loaded(comm):
        model = net()
        SlowMo(NeverLoaded(model.parameters(), lr=0.1 + comm.rank), model, comm=comm)

    for work, word in ((unpicklable, "pickle"), (never_loaded, "NotImplementedError: not here")):
        for kind, said in raised(work):
            assert kind is ValueError
            assert "can't be given to another worker" in said
            assert word in said


def test_set_optimizer_state_dict_is_refused_before_it_changes_rates_or_gradients():
    model, optimizer = make(SGD, SoloComm())
    with pytest.raises(ValueError, match="would lose SlowMo's anchor"):
        set_optimizer_state_dict(model, optimizer, {"state": {}, "param_groups": []})
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(p.grad is None for p in model.parameters())


def test_a_state_that_rank_0_alone_has_loaded_is_no_matter_of_horovods_broadcast():
    """Ranks without state would leave Horovod's function while rank 0 waits in it."""
    scope = {"__name__": "horovod.torch.functions"}
    exec("def broadcast_optimizer_state(optimizer): return optimizer.state_dict()", scope)

    def work(comm):
        model, optimizer = make(SGD, comm)
        scope["broadcast_optimizer_state"](optimizer)
        train(model, optimizer, comm.rank, 2)
        saved = optimizer.state_dict()
        model, optimizer = make(SGD, comm)
        if comm.rank == 0:
            optimizer.load_state_dict(saved)
        scope["broadcast_optimizer_state"](optimizer)

    for kind, said in raised(work):
        assert kind is ValueError
        assert "rank 1 differs from rank 0: steps at hvd.broadcast_optimizer_state" in said
        assert "it has 0 where 2 is expected" in said


class Wrapping:
    """Wrapper that copies an optimizer's attributes, as Lightning's does; counts the steps that are taken with it."""

    def __init__(self, optimizer):
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("step", "__del__")}
        self.__class__ = type("Lightning" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})
        self.wrapped, self.calls = optimizer, 0

    def step(self, closure=None):
        self.calls += 1
        return self.wrapped.step(closure)


def test_a_join_takes_the_others_steps_without_the_wrapper():
    def work(comm):
        model = net()
        wrapper = Wrapping(SlowMo(sgd(model), model, SlowMoConfig.ar_sgd(), comm=comm))
        train(model, wrapper, comm.rank, 1 + 2 * comm.rank)
        assert wrapper.join().behind == 2 - 2 * comm.rank
        return wrapper.calls, held(model)

    (first, values), (second, others) = ThreadWorld(2).run(work)
    assert (first, second) == (1, 3)
    assert_same(values, others)


class Raising:
    def __float__(self):
        raise RuntimeError("no number")


RATES = [10**400, 1e308, -1e308, float("inf"), float("nan"), "0.1", b"0.1", None, Raising()]


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: type(rate).__name__)
def test_a_rate_that_no_step_can_take_raises_alike_on_every_rank(rate):
    def work(comm):
        model, optimizer = make(SGD, comm, tau=2)
        if comm.rank == 1:
            optimizer.param_groups[0]["lr"] = rate
        train(model, optimizer, comm.rank, 2)

    for kind, said in raised(work):
        assert kind is ValueError
        assert "a learning rate on rank 1 is not a finite number >= 0" in said

    model, optimizer = make(SGD, SoloComm())
    optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(ValueError, match="no step can be taken with the learning rate of parameter group 0"):
        train(model, optimizer, 0, 1)


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate != 1e308], ids=lambda rate: type(rate).__name__)
def test_a_rate_that_is_no_number_is_refused_at_construction(rate):
    model = net()
    inner = sgd(model)
    inner.param_groups[0]["lr"] = rate
    with pytest.raises((TypeError, ValueError), match=r"`param_groups\[0\]\['lr'\]` must be a finite number >= 0"):
        SlowMo(inner, model, comm=SoloComm())


VALUELESS = {
    "lazy": (nn.LazyLinear(2), "weight of a lazy module has no shape yet. Pass one batch"),
    "meta": (nn.Linear(2, 1, device="meta"), "weight is on the meta device"),
    "meta buffer": (nn.BatchNorm1d(2, affine=False, device="meta"), "running_mean is on the meta device"),
}


@pytest.mark.parametrize("kind", VALUELESS)
def test_tensors_without_values_are_refused_on_every_rank(kind):
    def work(comm):
        head = nn.Linear(4, 2)
        part, _ = VALUELESS[kind]
        SlowMo(torch.optim.SGD(head.parameters(), lr=0.1), nn.ModuleList([head, part]), comm=comm)

    for error, said in raised(work):
        assert error is ValueError
        assert VALUELESS[kind][1] in said
