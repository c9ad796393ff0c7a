"""Inner optimizers that are more than their state, and functions that call an optimizer for ends of their own."""

import copy

import pytest
import torch
from torch import nn

import hvd_slowmo.torch as slowmo
from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.comm.threads import ThreadWorld
from support.inner_optimizers import Adaptive, Lion, OwnForm


def training(comm, kind=Adaptive, **config):
    model = nn.Linear(2, 1)
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    return model, slowmo.SlowMo(kind(model.parameters(), lr=0.01), model, comm=comm, tau=3, **config)


def steps(model, optimizer, count, rank=0, first=0):
    for number in range(first, first + count):
        optimizer.zero_grad()
        x = torch.tensor([[1.0 + number, 2.0 - rank]]) / 10
        (model(x) ** 2).sum().backward()
        optimizer.step()


def settings(optimizer):
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


@pytest.mark.parametrize("by", ["save", "state_dict"])
@pytest.mark.parametrize("count", [2, 4])
def test_a_resume_carries_what_steps_move_in_param_groups(by, count, tmp_path):
    def work(comm):
        model, optimizer = training(comm)
        steps(model, optimizer, count, comm.rank)
        other, again = training(comm)
        if by == "save":
            optimizer.save(tmp_path / "x")
            again.load(tmp_path / "x")
        else:
            other.load_state_dict(copy.deepcopy(model.state_dict()))
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert settings(again) == settings(optimizer)
        for each in ((model, optimizer), (other, again)):
            steps(*each, 3, comm.rank, first=count)
        assert settings(again) == settings(optimizer)
        return [torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)]

    assert ThreadWorld(2).run(work) == [[True, True]] * 2


def test_a_reset_sets_back_what_steps_move_and_nothing_else():
    model, optimizer = training(SoloComm(), inner_state="reset", beta=0.0)
    optimizer.param_groups[0]["lr"] = 0.02
    steps(model, optimizer, 2)
    assert settings(optimizer)[0]["k"] == 2
    assert "largest" in settings(optimizer)[0]
    steps(model, optimizer, 1)
    assert settings(optimizer) == [{"lr": 0.02, "d": 0.5, "k": 0, "weight_sum": 0}]


def test_state_of_a_class_with_attributes_of_its_own_is_averaged():
    def work(comm):
        model, optimizer = training(comm, Lion, inner_state="average")
        steps(model, optimizer, 3, comm.rank)
        return [state["average"] for state in optimizer.state.values()]

    first, second = ThreadWorld(2).run(work)
    assert len(first) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_state_dict_of_another_form_is_refused_on_every_rank():
    def work(comm):
        with pytest.raises(ValueError, match=r"state_dict of OwnForm has no 'param_groups' and no 'state'"):
            training(comm, OwnForm if comm.rank == 1 else torch.optim.SGD)

    ThreadWorld(2).run(work)


class Wrapping:
    """Wrapper that copies an optimizer's attributes, as Lightning's LightningOptimizer does."""

    def __init__(self, optimizer):
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("step", "__del__")}
        self.__class__ = type("Lightning" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)


def test_a_copy_of_the_attributes_shares_the_position():
    def work(comm):
        model, optimizer = training(comm)
        wrapped = Wrapping(optimizer)
        found = []
        for _ in range(3):
            steps(model, wrapped, 2 + 2 * comm.rank, comm.rank)
            behind = wrapped.join().behind
            found.append((behind, wrapped.steps, optimizer.steps, model.weight.tolist()))
        return found

    first, second = ThreadWorld(2).run(work)
    assert [each[:3] for each in first] == [(2, 4, 4), (2, 8, 8), (2, 12, 12)]
    assert [each[0] for each in second] == [0, 0, 0]
    assert [each[3] for each in first] == [each[3] for each in second]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at what it does not trace
@pytest.mark.slow
def test_compiled_steps_take_outer_steps():
    results = []
    for compiles in (False, True):
        model, optimizer = training(SoloComm(), torch.optim.SGD, beta=0.5)

        def step(x, model=model, optimizer=optimizer):
            loss = (model(x) ** 2).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        run = torch.compile(step, backend="eager") if compiles else step
        for number in range(7):
            run(torch.tensor([[1.0 + number, 2.0]]) / 10)
        results.append(model.weight.clone())
    assert torch.equal(*results)


def test_a_foreign_checkpoint_is_refused():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = training(SoloComm(), torch.optim.Adam)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=r"would lose SlowMo's anchor.*optimizer\.save\(path\)"):
        get_optimizer_state_dict(model, optimizer)
    assert optimizer.steps == 0
    assert torch.equal(model.weight, before)


@pytest.mark.slow
@pytest.mark.workers
def test_horovods_broadcasts_left_in_a_script_change_nothing(horovod_workers):
    for steps_taken, same, said in horovod_workers(2).run("support.jobs.pytorch_broadcasts:left_in"):
        assert steps_taken == 4
        assert same
        assert "hvd.elastic.TorchState would take steps" in said
