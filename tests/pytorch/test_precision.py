"""Half-precision parameters and the loss scaler."""

import copy

import pytest
import torch
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_of_the_write_never_enters_the_momentum(dtype):
    """Without gradients Delta is 0, so v must decay by beta alone, although each write to the model rounds."""

    def work(comm):
        model = nn.Linear(64, 1, bias=False).to(dtype)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=1.0), model, SlowMoConfig(tau=1, beta=0.9), comm=comm)
        model.weight.grad = torch.linspace(0.1, 0.3, 64).to(dtype)[None]
        optimizer.step()
        model.weight.grad = torch.zeros_like(model.weight)
        vectors = optimizer.state_dict()["slowmo"]["vectors"]
        v, anchor = vectors["v"][0].clone(), vectors["anchor"][0].clone()
        for _ in range(100):
            optimizer.step()
            v *= 0.9
            anchor -= v
            assert torch.equal(model.weight.detach()[0], vectors["anchor"][0].to(dtype))
        torch.testing.assert_close(vectors["v"][0], v, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(vectors["anchor"][0], anchor, rtol=0, atol=1e-5)

    ThreadWorld(2).run(work)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_the_outer_trajectory_is_that_of_the_written_values(dtype, nesterov):
    """Algorithm 1 in float64, on the values that the workers held at the start and end of each block."""
    config = SlowMoConfig(tau=3, alpha=0.8, beta=0.6, nesterov=nesterov)

    def work(comm):
        torch.manual_seed(0)
        model = nn.Linear(50, 1, bias=False).to(dtype)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.05), model, config, comm=comm)
        ends, starts, anchors = [], [model.weight.detach().double().clone()], []
        for k in range(30):
            noise = torch.randn(1, 50, generator=torch.Generator().manual_seed(100 * comm.rank + k))
            model.weight.grad = (model.weight.detach().float() + noise).to(dtype)
            if k % 3 == 2:
                end = copy.deepcopy(model)
                torch.optim.SGD(end.parameters(), lr=0.05).zero_grad()
                end.weight.grad = model.weight.grad.clone()
                torch.optim.SGD(end.parameters(), lr=0.05).step()
                ends.append(end.weight.detach().double())
            optimizer.step()
            if k % 3 == 2:
                starts.append(model.weight.detach().double().clone())
                anchors.append(optimizer.state_dict()["slowmo"]["vectors"]["anchor"][0].double().clone())
        return starts, ends, anchors

    first, second = ThreadWorld(2).run(work)
    anchor, v = first[0][0][0], torch.zeros(50, dtype=torch.float64)
    for block in range(10):
        delta = first[0][block][0] - (first[1][block] + second[1][block])[0] / 2
        v = 0.6 * v + delta
        anchor = anchor - 0.8 * (0.6 * v + delta if nesterov else v)
        torch.testing.assert_close(first[2][block], anchor, rtol=0, atol=2e-6)


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)


def overflowing_step(model, optimizer, grad_scaler, overflow, unscale=False, k=0, rank=0):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * k + rank))
    optimizer.zero_grad()
    loss = model(x).square().mean()
    grad_scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
    if unscale:
        grad_scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    grad_scaler.step(optimizer)
    grad_scaler.update()


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_base_optimizer_sees_what_it_would_see_alone(unscale, fused):
    torch.manual_seed(1)
    ours = nn.Linear(3, 2)
    theirs = copy.deepcopy(ours)
    adam = {"lr": 0.01, "fused": fused}
    wrapped = SlowMo(torch.optim.Adam(ours.parameters(), **adam), ours, SlowMoConfig.local_sgd(2))
    bare = torch.optim.Adam(theirs.parameters(), **adam)
    mine, other = scaler(), scaler()
    for k in range(9):
        overflowing_step(ours, wrapped, mine, k in (2, 5), unscale, k)
        overflowing_step(theirs, bare, other, k in (2, 5), unscale, k)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
        assert mine.get_scale() == other.get_scale()
    assert wrapped.steps == 9


def test_pytorch_76282_an_overflow_on_one_rank_does_not_shift_its_steps():
    def work(comm):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=4), comm=comm)
        grad_scaler = scaler()
        overflows = torch.rand(24, generator=torch.Generator().manual_seed(comm.rank)) < 0.3
        outer = []
        for k in range(24):
            overflowing_step(model, optimizer, grad_scaler, bool(overflows[k]), k=k, rank=comm.rank)
            if k % 4 == 3:
                outer.append(model.weight.detach().clone())
        return int(overflows.sum()), grad_scaler.get_scale(), outer

    results = ThreadWorld(3).run(work)
    assert len({skipped for skipped, _, _ in results}) > 1
    for _, _, outer in results:
        assert all(torch.equal(a, b) for a, b in zip(outer, results[0][2], strict=True))


def test_float16_gradients_are_refused_by_the_scaler_as_without_slowmo():
    model = nn.Linear(3, 2).half()
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=2))
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        overflowing_step_half(model, optimizer)


def overflowing_step_half(model, optimizer):
    grad_scaler = scaler()
    grad_scaler.scale(model.weight.float().square().sum()).backward()
    grad_scaler.step(optimizer)
