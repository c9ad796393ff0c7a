"""Bugs of other implementations, each as a test of this one. Sources: the projects' code and issue trackers."""

import copy

import pytest
import torch
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.problems import Problem
from support.trainings.pytorch import run


def worker(comm, config, seed=0, model=None, base=None):
    torch.manual_seed(seed)
    model = model or nn.Linear(4, 2)
    base = base or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, SlowMo(base, model, config, comm=comm)


def train(model, optimizer, rank, steps, first=0):
    for k in range(first, first + steps):
        generator = torch.Generator().manual_seed(100 * rank + k)
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("tau", [1, 3])
def test_fairscale_torchdistx_anchor_is_taken_before_the_first_step_and_the_first_block_has_tau_steps(tau):
    problem = Problem({"tau": tau}, steps=tau + 1)
    first, second = ThreadWorld(2).run(lambda comm: run(problem, comm))
    assert (first[0]["anchor"] == problem.start()).all()
    assert (first[tau]["x"] == second[tau]["x"]).all()
    assert (first[tau - 1]["anchor"] == problem.start()).all()
    if tau > 1:
        assert (first[tau + 1]["x"] != second[tau + 1]["x"]).any()


def test_fairscale_ranks_that_start_apart_agree_after_the_exact_step():
    def work(comm):
        model, optimizer = worker(comm, SlowMoConfig(tau=2), seed=comm.rank)
        train(model, optimizer, comm.rank, 2)
        return model.weight.detach().clone()

    first, *others = ThreadWorld(3).run(work)
    assert all(torch.equal(first, other) for other in others)


def test_fairscale_torchdistx_a_rate_of_zero_is_no_error():
    def work(comm):
        model, optimizer = worker(comm, SlowMoConfig(tau=2))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.0 if k < 4 else 1.0)
        for k in range(8):
            train(model, optimizer, comm.rank, 1, k)
            schedule.step()
        return bool(model.weight.isfinite().all())

    assert ThreadWorld(2).run(work) == [True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fairscale_torchdistx_half_precision_keeps_the_slow_state_in_float32(dtype):
    def work(comm):
        model = nn.Linear(4, 2).to(dtype)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=2), comm=comm)
        for k in range(4):
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.1 + comm.rank + k)
            optimizer.step()
        state = optimizer.state_dict()["slowmo"]["vectors"]
        return model.weight.detach().clone(), [t.dtype for name in ("anchor", "v") for t in state[name]]

    (first, types), (second, _) = ThreadWorld(2).run(work)
    assert torch.equal(first, second)
    assert first.dtype == dtype
    assert types == [torch.float32, torch.float32]


def test_fairscale_torchdistx_the_checkpoint_has_momentum_anchor_and_counter_and_is_not_eaten():
    model, optimizer = worker_alone(SlowMoConfig(tau=3))
    train(model, optimizer, 0, 4)
    state = optimizer.state_dict()
    assert state["slowmo"]["progress"]["step"] == 4
    assert {"anchor", "v"} == state["slowmo"]["vectors"].keys()
    keys = {key: set(value) if isinstance(value, dict) else None for key, value in state.items()}
    given = copy.deepcopy(state)
    optimizer.load_state_dict(given)
    assert {key: set(value) if isinstance(value, dict) else None for key, value in given.items()} == keys


def worker_alone(config):
    model = nn.Linear(4, 2)
    return model, SlowMo(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, config)


def test_torchdistx_a_parameter_unfrozen_later_under_adam():
    """There, slow momentum in the inner optimizer's state[p] made Adam skip its initialization."""

    def work(comm):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        model[1].requires_grad_(False)
        base = torch.optim.Adam(model.parameters(), lr=0.01)
        optimizer = SlowMo(base, model, SlowMoConfig(tau=2), comm=comm)
        train(model, optimizer, comm.rank, 4)
        assert not any(base.state[p] for p in model[1].parameters())
        model[1].requires_grad_(True)
        train(model, optimizer, comm.rank, 4, 4)
        assert base.state[model[1].weight]["step"] == 4
        return model[1].weight.detach().clone()

    first, second = ThreadWorld(2).run(work)
    assert torch.equal(first, second)


def test_torchdistx_closures_defaults_and_onecycle():
    model, optimizer = worker_alone(SlowMoConfig(tau=2))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 4)).square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(6):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[-1] < losses[0]
    assert optimizer.inner_optimizer.param_groups[0]["momentum"] != 0.9  # OneCycleLR cycles it


def test_torchdistx_param_groups_are_not_stale_after_load_state_dict():
    model, optimizer = worker_alone(SlowMoConfig(tau=2))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    before = model.weight.detach().clone()
    train(model, optimizer, 0, 1)
    assert torch.equal(model.weight, before)


def test_postlocalsgd_every_parameter_is_averaged_whether_or_not_it_has_a_gradient_here():
    def work(comm):
        model = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(3)])
        config = SlowMoConfig.local_sgd(1)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=1.0), model, config, comm=comm)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.0)
        (model[comm.rank](torch.ones(1, 1)) * -(comm.rank + 1)).sum().backward()  # another parameter on each rank
        optimizer.step()
        return [p.item() for p in model.parameters()]

    assert ThreadWorld(3).run(work) == [[pytest.approx(x) for x in (1 / 3, 2 / 3, 1.0)]] * 3


def test_postlocalsgd_parameters_are_never_rebound():
    model, optimizer = worker_alone(SlowMoConfig(tau=1))
    places = [p.data_ptr() for p in model.parameters()]
    alias = model.weight.view(-1)
    train(model, optimizer, 0, 3)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert torch.equal(alias, model.weight.view(-1))


def test_torchft_tensors_larger_than_a_chunk_are_not_dropped(monkeypatch):
    monkeypatch.setattr("hvd_slowmo_torch.optimizer.SlowMo._chunk_bytes", 12)

    def work(comm):
        model, optimizer = worker(comm, SlowMoConfig.local_sgd(1))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.arange(p.numel()).view(p.shape) * (comm.rank + 1.0))
        optimizer.step()
        return [p.detach().reshape(-1).tolist() for p in model.parameters()]

    expected = [[1.5 * k for k in range(8)], [0.0, 1.5]]
    assert ThreadWorld(2).run(work) == [expected, expected]


def test_horovod_broadcast_optimizer_state_counts_no_step_here():
    """Horovod's helper calls step() with zero gradients, which would count, decay weights and communicate."""

    def work(comm):
        model = nn.Linear(4, 2)
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
        _, optimizer = worker(comm, SlowMoConfig(tau=2), model=model, base=base)
        return optimizer.steps, len(base.state)

    assert ThreadWorld(2).run(work) == [(0, 0), (0, 0)]
