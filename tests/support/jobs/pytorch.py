"""Jobs for Horovod workers (see ../pool.py) other than problems: misuse, failures, process sets."""

from __future__ import annotations

import contextlib
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import hvd_slowmo.torch as slowmo
from hvd_slowmo.core.start import bulk
from hvd_slowmo.torch import SlowMo, SlowMoConfig, mean
from hvd_slowmo_torch.comm.workers import connect
from support.late_copies import LateCopies
from support.problems import Problem
from support.trainings.pytorch import run


def train(model: nn.Module, optimizer: SlowMo, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()


def misuse(kind: str) -> str:
    """Do one thing wrong on rank 1; return the error."""
    odd = slowmo.rank() == 1
    model: nn.Module = nn.Linear(3, 5 if odd and kind == "shape" else 4)
    if odd and kind == "names":
        model.other, model.weight = model.weight, None
    if kind == "order":
        parts = [nn.Linear(2, 2), nn.Linear(2, 2)]
        model = nn.ModuleDict({"a": parts[0], "b": parts[1]})
        groups = list(model["b"].parameters()) + list(model["a"].parameters()) if odd else list(model.parameters())
    else:
        groups = list(model.parameters())
    if odd and kind == "type":
        model.double()
    base = torch.optim.SGD(groups, lr=0.1)
    config = SlowMoConfig(tau=4 if odd and kind == "tau" else 3, beta=0.6 if odd and kind == "beta" else 0.5)
    try:
        optimizer = SlowMo("no optimizer" if odd and kind == "argument" else base, model, config)
        for k in range(3):
            if odd and k == 2:
                if kind == "rate":
                    base.param_groups[0]["lr"] = float("nan")
                    before = [p.detach().clone() for p in model.parameters()]
                if kind == "parameter":
                    with torch.no_grad():
                        model.weight[1, 1] = float("inf")
                if kind == "steps":
                    optimizer.worker.progress = optimizer.worker.progress._replace(step=5)
            if odd and kind == "place" and k == 2:
                with optimizer.averaged_parameters():
                    pass
            elif kind == "rate" and odd and k == 2:
                optimizer.zero_grad()
                optimizer.step()  # no gradients: the inner optimizer leaves the parameters alone
            else:
                train(model, optimizer, 1)
    except (TypeError, ValueError) as error:
        if kind == "parameter":  # nothing was written: only this rank has the infinity
            assert bool(model.weight.isfinite().all()) != odd
        if kind == "rate" and odd:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def wrapped_by_horovod(op: str) -> str:
    """Wrap Horovod's optimizer; return the error."""
    import horovod.torch as hvd

    model = nn.Linear(3, 4)
    inner = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), op=getattr(hvd, op))
    with pytest.raises(TypeError) as caught:
        SlowMo(inner, model, SlowMoConfig())
    return str(caught.value)


def averaged_loss() -> tuple[float, float, list[float]]:
    """Average a number, a number that one worker alone has, and a tensor."""
    rank = slowmo.rank()
    alone = mean({"loss": float("nan") if rank else 4.0}, weight=float(not rank))["loss"]
    return mean(float(rank), weight=rank), alone, mean(torch.tensor([rank, 1.0])).tolist()


def goes_on() -> float:
    """Train after an error in the previous run: the workers are still in step."""
    model = nn.Linear(3, 4)
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=2))
    train(model, optimizer, 4)
    return model.weight.double().sum().item()


def lost_worker(how: str) -> str:
    """End rank 1 in the middle of a block; return the others' errors, then and when they continue."""
    model = nn.Linear(3, 4)
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=3))
    train(model, optimizer, 4)
    if slowmo.rank() == 1:
        os._exit(0 if how == "ends" else 9)
    started = time.monotonic()
    try:
        train(model, optimizer, 6)
    except RuntimeError as error:  # of the transport's own class
        first = f"{type(error).__name__}: {error}"
    try:
        train(model, optimizer, 6)
    except RuntimeError as error:
        return f"{first} | {error} | {time.monotonic() - started:.1f}"
    return "nothing was raised"


def stalls() -> str:
    """Let rank 1 never reach the outer step."""
    model = nn.Linear(3, 4)
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=3))
    if slowmo.rank() == 1:
        time.sleep(15)
    train(model, optimizer, 3)
    return "nothing was raised"


def halves(sets: list[list[int]]) -> list[float]:
    """Train two process sets, or process groups, independently of each other."""
    if dist.is_initialized():
        groups = [dist.new_group(ranks) for ranks in sets]
        mine, other = groups if slowmo.rank() in sets[0] else groups[::-1]
        given, foreign = {"process_group": mine}, {"process_group": other}
    else:
        import horovod.torch as hvd

        members = [hvd.add_process_set(ranks) for ranks in sets]
        mine, other = sorted(members, key=lambda each: not each.included())
        given, foreign = {"process_set": mine}, {"process_set": other}
    torch.manual_seed(slowmo.rank())
    model = nn.Linear(3, 4)
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=2), **given)
    train(model, optimizer, 2)
    with pytest.raises(ValueError, match=r"is not in the process (set|group)"):
        SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(), **foreign)
    result = model.weight.detach().reshape(-1).tolist()
    if not dist.is_initialized():
        for each in members:
            hvd.remove_process_set(each)
    return result


def averaged() -> tuple[list[float], list[float], list[float]]:
    """Return the values before, within and after averaged_parameters()."""
    model = nn.Linear(2, 1)
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=10))
    with torch.no_grad():
        model.weight += slowmo.rank()
    own = model.weight.tolist()[0]
    with optimizer.averaged_parameters():
        inside = model.weight.tolist()[0]
    return own, inside, model.weight.tolist()[0]


def large(elements: int) -> bool:
    """Average several chunks of the default length; the mean of rank-dependent values is correct everywhere."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(elements)), nn.Parameter(torch.zeros(3))])
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig.local_sgd(1))
    assert len(optimizer.worker.assembly.machine.layout.chunks) > 2
    ramp = torch.arange(elements, dtype=torch.float32) % 1000
    with torch.no_grad():
        model[0].copy_(ramp * (slowmo.rank() + 1))
    optimizer.step()
    mean = sum(ramp * (r + 1) for r in range(slowmo.size())) / slowmo.size()
    return torch.equal(model[0].detach(), mean)


def own_collectives_after_join() -> float:
    """Train on uneven data, join, and run a collective of the script."""
    model = nn.Linear(3, 4)
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=3))
    train(model, optimizer, 2 + 3 * slowmo.rank())
    optimizer.join()
    own = torch.ones(1)
    if dist.is_initialized():
        dist.all_reduce(own)
        return own.item()
    import horovod.torch as hvd

    return hvd.allreduce(own, op=hvd.Sum, name="own").item()


def against_ddp(store: str, scaled: bool) -> tuple[list, list, int]:
    """Train the same model with SlowMo's averaged gradients and with DistributedDataParallel."""
    horovod = not dist.is_initialized()
    if horovod:
        where = {"rank": slowmo.rank(), "world_size": slowmo.size()}
        dist.init_process_group("gloo", init_method=f"file://{store}{scaled}", **where)

    def training(wrap) -> tuple[list, int]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        forward, optimizer, no_sync = wrap(model, base)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaled)
        for k in range(6):
            optimizer.zero_grad()
            for part in range(2):
                x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * slowmo.rank() + 2 * k + part))
                bad = float("inf") if scaled and (slowmo.rank(), k) in ((1, 2), (0, 4)) else 1.0
                with no_sync() if part == 0 else contextlib.nullcontext():
                    scaler.scale(forward(x).square().mean() * bad).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        return [p.detach().numpy().copy() for p in model.parameters()], getattr(optimizer, "steps", 0)

    def with_slowmo(model, base):
        optimizer = SlowMo(base, model, SlowMoConfig.ar_sgd(), transport="horovod" if horovod else "torch")
        return model, optimizer, optimizer.no_sync

    def with_ddp(model, base):
        wrapped = nn.parallel.DistributedDataParallel(model)
        return wrapped, base, wrapped.no_sync

    ours, steps = training(with_slowmo)
    theirs, _ = training(with_ddp)
    if horovod:
        dist.destroy_process_group()
    return ours, theirs, steps


def node_without_init() -> str:
    """Train with gradients="node" after a plain hvd.init()."""
    model = nn.Linear(3, 4)
    try:
        SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(gradients="node"))
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def staged(problem: Problem, looks: int | None) -> list:
    """Train with tensors that go through host memory as those of a device would; None: directly."""
    comm = connect()
    if looks is not None:
        comm._outbox._copies = LateCopies(looks, torch.float64)
    return run(problem, comm, chunk_bytes=40)


def run_on_own_device(problem: Problem) -> list:
    """Train on the device of this worker's number."""
    device = f"cuda:{slowmo.rank()}"
    torch.cuda.set_device(device)
    return run(problem, chunk_bytes=40, devices=[device])


def on_device(width: int) -> list[float]:
    """Train a model of several chunks on the CUDA device: warm-up with averaged gradients, then blocks."""
    torch.manual_seed(slowmo.rank())
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(3))).cuda()
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer = SlowMo(base, model, SlowMoConfig(tau=2, warmup_steps=3))
    assert len(optimizer.worker.assembly.machine.layout.chunks) > 2
    for _ in range(7):
        optimizer.zero_grad()
        model(torch.randn(16, width, device="cuda")).square().mean().backward()
        optimizer.step()
    return [p.detach().double().sum().item() for p in model.parameters()]


def without_synchronisation(gradients: str) -> str:
    """Take inner steps in the mode of PyTorch that raises on any wait for the device."""
    model = nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 2)).cuda()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SlowMo(base, model, SlowMoConfig(tau=20, gradients=gradients))
    x = torch.randn(8, 30, device="cuda")
    try:
        for k in range(6):
            if k == 2:  # the first steps allocate
                torch.cuda.set_sync_debug_mode("error")
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no synchronisation"


def uneven_on_device() -> tuple[list[float], list[float], list[float]]:
    """Return a worker's values in the middle of a block, the mean, and the values after join()."""
    model = nn.Linear(2, 1).cuda()
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=10))
    for _ in range(3):
        optimizer.step()
    with torch.no_grad():
        model.weight += slowmo.rank() + 1
    own = model.weight.tolist()[0]
    with optimizer.averaged_parameters():
        inside = model.weight.tolist()[0]
    optimizer.join()
    return own, inside, model.weight.tolist()[0]


def handed_out(small: int) -> dict[str, torch.Tensor]:
    """Return what rank 0 hands out: frozen tensors, buffers and Adam's state; `small` bytes at most are gathered."""
    bulk.SMALL_BYTES = small
    rank = slowmo.rank()
    random = torch.Generator().manual_seed(rank)
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40).bfloat16()).requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=random))
    model[0].weight.requires_grad_(True)
    model[1].weight[0, :3] = torch.tensor([-0.0, float("inf"), 1e-45]) if rank == 0 else 7.0
    model.register_buffer("mask", torch.rand((40, 41), generator=random) < 0.5)
    model.register_buffer("turned", torch.randn((30, 50), generator=random).t())
    inner = torch.optim.Adam([model[0].weight])
    if rank == 0:
        model[0].weight.grad = torch.randn((40, 40), generator=random)
        inner.step()
    SlowMo(inner, model, SlowMoConfig(tau=3))
    found = {**model.state_dict(), **inner.state[model[0].weight]}
    return {key: x.detach().clone() for key, x in found.items()}
