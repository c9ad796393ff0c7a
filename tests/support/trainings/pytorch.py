"""Train `support.problems.Problem` with the PyTorch adapter, on threads and as jobs on Horovod workers."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.torch import SlowMo
from hvd_slowmo.torch import rank as own_rank
from support.problems import Problem, chunks_of, config_of, pieces, with_node

BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class Model(torch.nn.Module):
    """The parameters of a problem, placed on these devices in turn."""

    def __init__(self, x: np.ndarray, devices: Sequence[str] = ("cpu",)) -> None:
        super().__init__()
        parts = [torch.tensor(part, device=device) for part, device in zip(pieces(x), cycle(devices), strict=False)]
        self.parts = torch.nn.ParameterList([torch.nn.Parameter(part) for part in parts])

    def flat(self) -> np.ndarray:
        return torch.cat([p.detach().cpu().reshape(-1) for p in self.parts]).numpy().copy()

    def set_gradient(self, gradient: np.ndarray) -> None:
        for p, part in zip(self.parts, pieces(gradient), strict=True):
            p.grad = torch.tensor(part, device=p.device)


def build(
    problem: Problem, comm: Comm | None, rank: int, node: Comm | None = None, devices: Sequence[str] = ("cpu",)
) -> tuple[Model, SlowMo]:
    """Return a worker's model and optimizer. Other ranks start from other values, which rank 0's must replace."""
    model = Model(problem.start() + rank, devices)
    groups = [
        {"params": [p for p, g in zip(model.parts, problem.groups, strict=True) if g == number], "lr": 0.0}
        for number in sorted(set(problem.groups))
    ]
    base = BASES[problem.base](groups, **{"lr": 1.0, **problem.options})
    config = config_of(problem.config)
    if comm is None:
        return model, SlowMo(base, model, config)
    return model, SlowMo(base, model, config, comm=with_node(comm, node))


def advance(problem: Problem, model: Model, optimizer: SlowMo, rank: int, steps: range) -> list[dict[str, Any]]:
    """Train; return the worker's values after each step."""
    history = []
    for step in steps:
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = problem.rate(step, number)
        model.set_gradient(problem.gradient(rank, step, model.flat()))
        optimizer.step()
        history.append(held(model, optimizer))
    return history


def held(model: Model, optimizer: SlowMo) -> dict[str, Any]:
    vectors = optimizer.state_dict()["slowmo"]["vectors"]
    whole = {name: parts for name, parts in vectors.items() if parts}  # of the others each worker has its slices
    flat = {name: torch.cat([part.cpu() for part in parts]).numpy().copy() for name, parts in whole.items()}
    return {"x": model.flat(), **flat}


def run(
    problem: Problem, comm: Comm | None = None, chunk_bytes: int | None = None, devices: Sequence[str] = ("cpu",)
) -> list[dict[str, Any]]:
    """Run all steps on one worker of `comm`, or of the pool."""
    rank = own_rank() if comm is None else comm.rank
    with chunks_of(chunk_bytes):
        model, optimizer = build(problem, comm, rank, devices=devices)
    return [held(model, optimizer), *advance(problem, model, optimizer, rank, range(problem.steps))]


def resumed(problem: Problem, stop: int, comm: Comm | None = None) -> list[dict[str, Any]]:
    """Stop after `stop` steps, save to bytes, and resume in new objects."""
    rank = own_rank() if comm is None else comm.rank
    model, optimizer = build(problem, comm, rank)
    before = advance(problem, model, optimizer, rank, range(stop))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    given = copy.deepcopy(saved["optimizer"])
    model, optimizer = build(problem, comm, rank)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert same(saved["optimizer"], given), "load_state_dict changed its caller's dict"
    return [*before, *advance(problem, model, optimizer, rank, range(stop, problem.steps))]


def epochs(problem: Problem, plan: list[tuple[int, ...]], comm: Comm | None = None) -> list[dict[str, Any]]:
    """Train epochs of plan[epoch][rank] steps with a join after each; return the worker's values after each join."""
    rank = own_rank() if comm is None else comm.rank
    model, optimizer = build(problem, comm, rank)
    history, taken = [], 0
    for lengths in plan:
        for _ in range(lengths[rank]):
            for number, group in enumerate(optimizer.param_groups):
                group["lr"] = problem.rate(optimizer.steps, number)
            optimizer.zero_grad()
            model.set_gradient(problem.gradient(rank, taken, model.flat()))
            optimizer.step()
            taken += 1
        joined = optimizer.join()
        history.append({**held(model, optimizer), "step": optimizer.steps, "behind": joined.behind})
    return history


def same(a: Any, b: Any) -> bool:
    """Return True if the values, nested in dicts and lists, are bitwise identical."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    return bool(a == b)
