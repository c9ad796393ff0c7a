"""The oracle for uneven data: Algorithm 1 with a join at the end of every epoch (see slowmo.py for the rest).

Workers are simulated in lockstep: in a round every live worker (one that has batches left in this epoch) takes one
inner step. Inside a block no worker waits for another, so their order changes nothing. All live workers have the same
step count, the clock; a worker that is done keeps its own count until the join.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.slowmo import _BASES, Array, Buffers, Gradient, Rate, _begin_block, _checked, _outer_step


@dataclass(frozen=True, eq=False)
class Epoch:
    """The state right after the join that ends an epoch. All copies.

    x: (m, d), the workers' parameters, all rows equal.
    anchor, v, gamma: (d,), (d,) and (G,), as in Snapshot; a join does not change them.
    step: the common step count, warm-up included.
    behind: (m,), by how many steps each worker's own step count was below the common one when it joined.
    outer_steps: number of outer steps since the start.
    """

    x: Array
    anchor: Array
    v: Array
    gamma: Array
    step: int
    behind: NDArray[np.int64]
    outer_steps: int


def _mean_buffers(state: list[Buffers]) -> None:
    """Average the inner state over all workers; one without a step has zeros, and a step count of 0."""
    for buffers in list(state):
        for name, value in buffers.items():
            for worker in state:
                worker.setdefault(name, np.zeros_like(value))
    _begin_block("average", state)


def run_epochs(
    x0: Array,
    gradient: Gradient,
    *,
    epochs: Sequence[Sequence[int]],
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
) -> list[Epoch]:
    """Run Algorithm 1 over epochs of uneven length; return one Epoch per epoch, after its join.

    epochs: epochs[e][i] is the number of batches of worker i in epoch e; 0 is allowed.
    gradient: gradient(worker, own_step, x) -> (d,); own_step counts the earlier batches of this worker,
        over all epochs.
    lr: a rate, or lr(worker, step, group) -> rate; step is the 0-based step count of the worker, that is, after a join
        the step count of the worker with the most steps. Called once per step of a worker that has a batch, and group.
    Everything else is as for reference.run.

    A block ends when its tau steps of the clock are full. The share of a worker is the number of its inner steps since
    the last average (outer step or join), / tau. Each mean weighs the workers by their shares, so a worker that is
    done counts with the steps of its unfinished block the first time and with 0 from then on. gamma_t is (sum of the
    workers' sums of rates) / (sum of the steps that these sums cover).

    Join: the mean, by shares; then all workers have the step count, the sum of rates and the number of steps that it
    covers of the worker with the most steps (the first one of several). If all shares are 0 a block has just ended for
    all workers: x stays. Anchor, v and gamma stay, and the block goes on.

    While gradients are averaged, the mean is over live workers; one that is done takes the inner step with this mean
    and the live workers' rates (the first one's, if they differ), which counts as a step of this worker, but not as a
    batch. So all are equal at a join, which averages nothing. If the live workers' rates differ, the workers differ:
    the join averages them, and in warm-up it raises ValueError, as the end of warm-up does.
    """
    m = workers
    if any(len(batches) != m or min(batches, default=0) < 0 for batches in epochs):
        raise ValueError("every epoch must name the number of batches of every worker")
    x0, group, rate_of = _checked(x0, groups, lr, m, tau, warmup_steps, base, inner_state, gradients)
    n_groups = int(group.max(initial=0)) + 1

    x = np.tile(x0, (m, 1))  # (m, d)
    state: list[Buffers] = [{} for _ in range(m)]
    anchor, u, v, gamma = x0.copy(), np.zeros_like(x0), np.zeros_like(x0), np.zeros(n_groups)
    clock = 0  # the live workers' step count; after a join, all workers'
    steps = np.zeros(m, dtype=np.int64)  # every worker's own step count
    batches_had = [0] * m  # own_step of the gradient
    since = np.zeros(m, dtype=np.int64)  # own inner steps since the last average
    rate_sums, rate_steps = np.zeros((m, n_groups)), np.zeros(m, dtype=np.int64)  # of the block; steps these cover
    outer_steps = 0
    history: list[Epoch] = []

    def weighted_mean() -> Array:
        """Return line 6 (d,), weighted by shares; exactly the plain mean where all shares are 1."""
        share = since / (1 if tau is None else tau)
        mean: Array = (share[:, np.newaxis] * x).sum(axis=0) / share.sum()
        return mean

    def inner_steps(live: list[int], average: bool) -> None:
        """Apply line 4 to the live workers, or to all if gradients are averaged."""
        g = {i: np.array(gradient(i, batches_had[i], x[i].copy()), dtype=np.float64) for i in live}
        if any(g_i.shape != x0.shape for g_i in g.values()):
            raise ValueError("a gradient must be (d,)")
        rates = {i: np.array([rate_of(i, clock, j) for j in range(n_groups)], dtype=np.float64) for i in live}
        for i in live:
            batches_had[i] += 1
        if average:
            g_mean: Array = np.mean(list(g.values()), axis=0)
            g = dict.fromkeys(range(m), g_mean)
            rates = {i: rates.get(i, rates[live[0]]) for i in range(m)}
        for i in g:
            x[i] = _BASES[base](x[i].copy(), g[i], rates[i][group], state[i], **(base_options or {}))
            rate_sums[i] += rates[i]
            rate_steps[i] += 1
            since[i] += 1
            steps[i] += 1

    for batches in epochs:
        for round_ in range(max(batches)):
            live = [i for i in range(m) if round_ < batches[i]]
            warm = clock < warmup_steps
            if not warm and tau is not None and (clock - warmup_steps) % tau == 0:  # line 2, on all workers
                if inner_state == "average":
                    _mean_buffers(state)
                else:
                    _begin_block(inner_state, state)
            inner_steps(live, average=warm or gradients == "all")
            clock += 1

            if clock == warmup_steps:
                if np.any(x != x[0]):
                    raise ValueError("the workers differ at the end of warm-up (do their rates?)")
                if tau is not None:
                    anchor = x[0].copy()
                since[:] = rate_sums[:] = rate_steps[:] = 0  # the first block starts here, on all workers
            elif not warm and tau is not None and (clock - warmup_steps) % tau == 0:
                gamma = rate_sums.sum(axis=0) / rate_steps.sum()  # sum of sums / sum of steps
                anchor = _outer_step(anchor, weighted_mean(), u, v, gamma, group, alpha=alpha, beta=beta,
                                     nesterov=nesterov, scale_by_lr=scale_by_lr)  # fmt: skip
                x[:] = anchor  # on all workers
                outer_steps += 1
                since[:] = rate_sums[:] = rate_steps[:] = 0

        # The join: all are done.
        if clock < warmup_steps:
            if np.any(x != x[0]):
                raise ValueError("the workers differ at a join in warm-up (do their rates?)")
        elif np.any(since > 0) and (gradients == "local" or np.any(x != x[0])):
            x[:] = weighted_mean()
        since[:] = 0
        most = int(np.argmax(steps))  # the first of several
        rate_sums[:], rate_steps[:] = rate_sums[most], rate_steps[most]
        behind = clock - steps
        steps[:] = clock
        history.append(Epoch(x.copy(), anchor.copy(), v.copy(), gamma.copy(), clock, behind, outer_steps))
    return history
