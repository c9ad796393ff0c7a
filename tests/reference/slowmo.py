"""The simple NumPy oracle: Algorithm 1 of SlowMo (Wang, Tantia, Ballas, Rabbat; arXiv 1910.00643).

Everything is float64, all workers live in one process, operations are rarely in place, and the outer step is
written with the paper's u, divided by the learning rate (lines 7 and 8), not in the rearranged form of the library:

    u_{t+1}   = beta u_t + (x_{t,0} - xbar_{t,tau}) / gamma_t
    x_{t+1,0} = x_{t,0} - alpha gamma_t u_{t+1}

Covered: no communication inside a block, and the exact average (line 6). m is the number of
workers, d the number of coordinates, G the number of parameter groups, tau the inner steps of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Buffers = dict[str, Array]  # one worker's inner state: name -> (d,) array, () for a step count; empty before step 1
Gradient = Callable[[int, int, Array], Array]  # (worker, step, x (d,)) -> (d,)
Rate = Callable[[int, int, int], float]  # (worker, step, group) -> gamma


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state at the start or after one inner step (and after the outer step, where one followed). All copies.

    step: inner steps completed, warm-up included.
    x: (m, d), the workers' parameters.
    anchor: (d,), x_{t,0} of the block under way; x0 before the end of warm-up, and always when tau is None.
    v: (d,), gamma u in units of x (u itself is in units of a gradient); with scale_by_lr=False heavy-ball on Delta.
    outer: an outer step has just happened.
    gamma: (G,), gamma_t of the last complete block, zeros before there is one.
    """

    step: int
    x: Array
    anchor: Array
    v: Array
    outer: bool
    gamma: Array


def _sgd(x: Array, g: Array, rate: Array, buffers: Buffers, *, momentum: float = 0.0, nesterov: bool = False,
         dampening: float = 0.0, weight_decay: float = 0.0) -> Array:  # fmt: skip
    """Return x (d,) after one step of torch.optim.SGD; g (d,) gradient, rate (d,). Writes buffers["momentum"] (d,)."""
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    g = g + weight_decay * x
    if momentum == 0:
        return x - rate * g
    if "momentum" not in buffers:
        buffers["momentum"] = g.copy()  # the first momentum is the gradient, not dampened
    else:
        buffers["momentum"] = momentum * buffers["momentum"] + (1 - dampening) * g
    return x - rate * (g + momentum * buffers["momentum"] if nesterov else buffers["momentum"])


def _adam(x: Array, g: Array, rate: Array, buffers: Buffers, *, betas: tuple[float, float] = (0.9, 0.999),
          eps: float = 1e-8, weight_decay: float = 0.0) -> Array:  # fmt: skip
    """Return x (d,) after one step of torch.optim.Adam (weight decay added to the gradient); shapes as for _sgd."""
    g = g + weight_decay * x
    if not buffers:
        buffers.update(step=np.zeros(()), first=np.zeros_like(x), second=np.zeros_like(x))
    buffers["step"] = np.asarray(buffers["step"] + 1)
    buffers["first"] = betas[0] * buffers["first"] + (1 - betas[0]) * g
    buffers["second"] = betas[1] * buffers["second"] + (1 - betas[1]) * g * g
    first = buffers["first"] / (1 - betas[0] ** buffers["step"])
    second = buffers["second"] / (1 - betas[1] ** buffers["step"])
    return x - rate * first / (np.sqrt(second) + eps)


def _adamw(x: Array, g: Array, rate: Array, buffers: Buffers, *, betas: tuple[float, float] = (0.9, 0.999),
           eps: float = 1e-8, weight_decay: float = 0.01) -> Array:  # fmt: skip
    """Return x (d,) after one step of torch.optim.AdamW (decoupled weight decay, first); shapes as for _sgd."""
    return _adam(x * (1 - rate * weight_decay), g, rate, buffers, betas=betas, eps=eps)


_BASES: dict[str, Callable[..., Array]] = {"sgd": _sgd, "adam": _adam, "adamw": _adamw}


def _begin_block(strategy: str, buffers: list[Buffers]) -> None:
    """Apply line 2 of Algorithm 1 to the inner state of all workers (a list of m)."""
    if strategy == "reset":
        for worker in buffers:
            worker.clear()  # as before the first step: Adam counts from 0, SGD's next momentum is a gradient
    elif strategy == "average":
        for name in list(buffers[0]):  # Adam's step count too
            mean = np.mean([worker[name] for worker in buffers], axis=0)
            for worker in buffers:
                worker[name] = np.array(mean, dtype=np.float64)


def _outer_step(start: Array, x_mean: Array, u: Array, v: Array, gamma: Array, group: NDArray[np.int64], *,
                alpha: float, beta: float, nesterov: bool, scale_by_lr: bool) -> Array:  # fmt: skip
    """Apply lines 7 and 8 per group with its gamma_t. Return the new anchor (d,); write u and v (d,).

    start (d,): x_{t,0}; x_mean (d,): line 6; gamma (G,): gamma_t; group (d,): the group of each coordinate.
    """
    new: Array = start.copy()
    for j in range(len(gamma)):
        c = group == j
        delta = start[c] - x_mean[c]
        gamma_t = gamma[j] if scale_by_lr else 1.0
        if gamma_t != 0:
            u[c] = beta * u[c] + delta / gamma_t  # line 7
            v[c] = gamma_t * u[c]
            v_next = v[c]
        else:
            v_next = delta  # nothing carried, and u and v are kept for the next block
        if nesterov:
            new[c] = start[c] - alpha * (beta * v_next + delta)
        else:
            new[c] = start[c] - alpha * v_next  # line 8
    return new


def _checked(
    x0: Array, groups: NDArray[np.integer[Any]] | None, lr: float | Rate, workers: int, tau: int | None,
    warmup_steps: int, base: str, inner_state: str, gradients: str,
) -> tuple[Array, NDArray[np.int64], Rate]:  # fmt: skip
    """Check the common arguments of `run` and `run_epochs`; return a copy of x0 (d,), the groups (d,) and the rate."""
    if workers < 1 or warmup_steps < 0 or (tau is not None and tau < 1):
        raise ValueError("workers and tau must be positive, warmup_steps not negative")
    if base not in _BASES or inner_state not in ("maintain", "reset", "average") or gradients not in ("local", "all"):
        raise ValueError(f"unknown base, inner_state or gradients: {base!r}, {inner_state!r}, {gradients!r}")
    x0 = np.array(x0, dtype=np.float64)
    group = np.zeros(x0.shape, dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)
    if x0.ndim != 1 or group.shape != x0.shape or np.any(group < 0):
        raise ValueError("x0 must be (d,), and groups (d,) numbers from 0")
    return x0, group, lr if callable(lr) else lambda worker, step, group: lr


def run(
    x0: Array,
    gradient: Gradient,
    *,
    steps: int,
    workers: int,
    lr: float | Rate,
    base: str = "sgd",
    base_options: Mapping[str, Any] | None = None,
    groups: NDArray[np.integer[Any]] | None = None,
    tau: int | None = 12,
    alpha: float = 1.0,
    beta: float = 0.5,
    nesterov: bool = False,
    scale_by_lr: bool = True,
    inner_state: str = "maintain",
    gradients: str = "local",
    warmup_steps: int = 0,
) -> list[Snapshot]:
    """Run Algorithm 1; return steps + 1 snapshots, the first one of the start.

    x0: (d,), common to all workers.
    gradient: gradient(worker, step, x) -> (d,), at x (d,), with the 0-based step (warm-up included).
    steps: inner steps, warm-up included; a last block that they cut short has no outer step.
    workers: m.
    lr: a rate, or lr(worker, step, group) -> rate; called once per worker, step and group.
    base, base_options: "sgd", "adam" or "adamw", and keywords of the torch optimizer of that name (no lr).
    groups: (d,) integers 0..G-1, the parameter group of each coordinate; None: one group.
    tau: inner steps of a block; None: no blocks, so no outer step, and the inner state is left alone.
    alpha, beta: the slow learning rate and the slow momentum (lines 7 and 8).
    nesterov: x_{t+1,0} = x_{t,0} - alpha (beta gamma_t u_{t+1} + Delta) in place of line 8.
    scale_by_lr: False takes gamma_t = 1 in lines 7 and 8: heavy-ball or Nesterov SGD on Delta.
    inner_state: line 2, "maintain", "reset" or "average", at the beginning of every block, the first included.
    gradients: "local", or "all": averaged over the workers at every step, before the inner optimizer.
    warmup_steps: number of first steps, which average the gradients and precede the first block and anchor.
        Workers must be equal at their end (they are, if their rates are), else ValueError: x_{0,0} must be common.

    gamma_t is the mean rate of the block over its steps and all workers, per group. If it is 0 (and scale_by_lr),
    nothing is carried: v_{t+1} = Delta in this one outer step, and the stored v and u stay as they were.
    """
    m = workers
    if steps < 0:
        raise ValueError("steps must not be negative")
    x0, group, rate_of = _checked(x0, groups, lr, m, tau, warmup_steps, base, inner_state, gradients)
    n_groups = int(group.max(initial=0)) + 1

    x = np.tile(x0, (m, 1))  # (m, d)
    state: list[Buffers] = [{} for _ in range(m)]
    anchor = x0.copy()  # x_{t,0}, (d,)
    u = np.zeros_like(x0)  # (d,)
    v = np.zeros_like(x0)  # gamma u, (d,)
    gamma = np.zeros(n_groups)  # (G,)
    rate_sums = np.zeros((m, n_groups))  # of the block so far

    def snapshot(step: int, outer: bool) -> Snapshot:
        return Snapshot(step, x.copy(), anchor.copy(), v.copy(), outer, gamma.copy())

    def inner_step(step: int, average: bool) -> None:
        """Apply line 4 on every worker: x^i_{t,k+1} = x^i_{t,k} - gamma d^i_{t,k}."""
        g = [np.array(gradient(i, step, x[i].copy()), dtype=np.float64) for i in range(m)]
        if any(g_i.shape != x0.shape for g_i in g):
            raise ValueError("a gradient must be (d,)")
        if average:
            g = [np.mean(g, axis=0)] * m
        for i in range(m):
            rates = np.array([rate_of(i, step, j) for j in range(n_groups)], dtype=np.float64)  # (G,)
            x[i] = _BASES[base](x[i].copy(), g[i], rates[group], state[i], **(base_options or {}))
            rate_sums[i] += rates

    history = [snapshot(0, False)]
    for step in range(min(warmup_steps, steps)):
        inner_step(step, average=True)
        if step == warmup_steps - 1 and tau is not None:
            if np.any(x != x[0]):
                raise ValueError("the workers differ at the end of warm-up (do their rates?)")
            anchor = x[0].copy()
        history.append(snapshot(step + 1, False))

    block = steps + 1 if tau is None else tau  # None: one block that never ends
    for first in range(warmup_steps, steps, block):  # for t = 0..T-1
        if tau is not None:
            _begin_block(inner_state, state)  # line 2
        rate_sums[:] = 0
        for step in range(first, min(first + block, steps)):  # for k = 0..tau-1
            inner_step(step, average=gradients == "all")
            outer = step == first + block - 1
            if outer:
                gamma = rate_sums.sum(axis=0) / (m * block)  # sum of sums / sum of steps
                x_mean = x.mean(axis=0)  # line 6
                anchor = _outer_step(anchor, x_mean, u, v, gamma, group, alpha=alpha, beta=beta, nesterov=nesterov,
                                     scale_by_lr=scale_by_lr)  # fmt: skip
                x[:] = anchor
            history.append(snapshot(step + 1, outer))
    return history
