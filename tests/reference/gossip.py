"""The oracle for gossip: SGP, OSGP and D-PSGD, with and without SlowMo and its average, also on uneven data.

Workers are simulated in lockstep with whole matrices, in float64 (see slowmo.py for the rest). Each worker has a
numerator x, a push-sum weight w and the de-biased z = x / w; P is the topology's matrix of the step, column-stochastic:

    z_new = inner step at z       the gradient is taken at z
    x     <- z_new + (x - x / w)  the same step on the numerator
    SGP     x <- P x,                          w <- P w
    OSGP    x <- diag(P) x + what came,        w likewise; what came was sent one step before, with that step's matrix
    D-PSGD  x <- P x                           P symmetric, w = 1

Decisions where the papers leave details open:
- Warm-up averages gradients and mixes nothing. The topology's step counts from its end, in steps of the clock: it goes
  on through blocks, outer steps and joins, those that mix nothing included.
- An outer step with the average, and a join, take sum(x) / sum(w) over workers and messages in flight. The last step of
  such a block mixes and sends nothing: its average does, and mixing first would not change it. Then w = 1, and nothing
  is in flight. Every worker weighs 1; gamma_t is (sum of the sums of rates) / (sum of the steps), as without gossip.
- Without the average (noaverage) the last step of a block mixes as any other, then each worker updates its z with its
  own anchor, v, and mean rate; x = w z, and w and what is in flight stay. So the messages in flight bring in numerators
  from before the update.
- A worker that is done mixes, sends, takes outer steps (without the average: its own), and has its inner state reset or
  averaged as all have. Without the average its gamma_t is over its own steps, and if there were none in the block it is
  0: nothing of v enters, and v and gamma stay (the rule for blocks whose rates are all 0).
- A join counts steps as without gossip: step count, sum of rates and the number of steps these cover become those of
  the worker with the most, anchors and v stay. In warm-up all are equal and nothing is averaged.
- Mixing goes on while any worker is live in the epoch. Further mixing, until the workers learn that all are done,
  changes neither sum, so the join's result is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.join import _mean_buffers
from reference.slowmo import _BASES, Array, Buffers, Gradient, Rate, _begin_block, _outer_step


@dataclass(frozen=True, eq=False)
class GossipSnapshot:
    """The state at the start, after one step (and the outer step, where one followed), or after a join. All copies.

    step: steps of the clock completed, warm-up included.
    x, w, z: (m, d), (m,) and (m, d), the numerators, the push-sum weights and the parameters x / w.
    flying_x, flying_w: (m, d) and (m,), the messages in flight by sender; zeros without overlap.
    anchor, v: (m, d), of each worker, equal rows with the average; as in Snapshot.
    gamma: (m, G), gamma_t of the last complete block of each worker, equal rows with the average.
    outer: an outer step has just happened.
    joined: a join has just happened.
    behind: (m,), by how many steps each worker's own step count is below the clock; before the join made them equal.
    """

    step: int
    x: Array
    w: Array
    z: Array
    flying_x: Array
    flying_w: Array
    anchor: Array
    v: Array
    gamma: Array
    outer: bool
    joined: bool
    behind: NDArray[np.int64]


def run_gossip(x0: Array, gradient: Gradient, **settings: Any) -> list[GossipSnapshot]:
    """Return all snapshots of `walk_gossip`, which documents the arguments."""
    return list(walk_gossip(x0, gradient, **settings))


def walk_gossip(
    x0: Array,
    gradient: Gradient,
    *,
    topology: NDArray[np.float64],
    lr: float | Rate,
    steps: int | None = None,
    epochs: Sequence[Sequence[int]] | None = None,
    gossip: str = "sgp",
    overlap: bool = False,
    base: str = "sgd",
    base_options: Mapping[str, Any] | None = None,
    groups: NDArray[np.integer[Any]] | None = None,
    tau: int | None = 12,
    alpha: float = 1.0,
    beta: float = 0.5,
    nesterov: bool = False,
    scale_by_lr: bool = True,
    inner_state: str = "maintain",
    average: bool = True,
    gradients: str = "local",
    nodes: Sequence[Sequence[int]] | None = None,
    warmup_steps: int = 0,
) -> Iterator[GossipSnapshot]:
    """Yield a snapshot of the start, one after every step, and with epochs one more after every join.

    topology: (period, m, m), m the number of workers; used as it is, only its columns' sums are checked.
    steps: number of steps of every worker, without a join.
    epochs: instead of steps: epochs[e][i] batches of worker i in epoch e, each epoch followed by a join.
    gradient, lr: as for reference_join.run_epochs: gradient(worker, own batches before, z), lr(worker, clock, group).
    gossip: "sgp" or "dpsgd".
    overlap: messages sent at a step are mixed at the next one (OSGP; "sgp" only).
    tau: None: the gossip algorithm alone.
    average: False: each worker takes outer steps independently (noaverage).
    gradients: whose are averaged at every step, "local", "node" or "all".
    nodes: the workers of each node, for gradients="node".
    Everything else is as for reference.run. While gradients are averaged a worker that is done takes the inner step
    too, with the mean of its node's live workers and the rates of the first of them, if it has any.
    """
    topology = np.array(topology, dtype=np.float64)
    m = topology.shape[-1]
    if topology.ndim != 3 or topology.shape[1] != m or np.any(np.abs(topology.sum(axis=1) - 1) > 1e-12):
        raise ValueError("topology must be (period, m, m), with columns that sum to 1")
    if gossip not in ("sgp", "dpsgd") or gradients not in ("local", "node", "all"):
        raise ValueError(f"unknown gossip or gradients: {gossip!r}, {gradients!r}")
    if base not in _BASES or inner_state not in ("maintain", "reset", "average"):
        raise ValueError(f"unknown base or inner_state: {base!r}, {inner_state!r}")
    if gossip == "dpsgd" and (overlap or np.any(np.abs(topology - topology.transpose(0, 2, 1)) > 1e-12)):
        raise ValueError("dpsgd has a symmetric topology and no overlap")
    if warmup_steps < 0 or (tau is not None and tau < 1):
        raise ValueError("tau must be positive, warmup_steps not negative")
    if (steps is None) == (epochs is None):
        raise ValueError("either steps or epochs")
    rounds: Sequence[Sequence[int]] = [[steps or 0] * m] if epochs is None else epochs
    if any(len(batches) != m or min(batches) < 0 for batches in rounds):
        raise ValueError("every epoch must name the number of batches of every worker")
    if gradients == "node" and sorted(i for node in nodes or () for i in node) != list(range(m)):
        raise ValueError("nodes must name every worker once")
    x0 = np.array(x0, dtype=np.float64)
    group = np.zeros(x0.shape, dtype=np.int64) if groups is None else np.asarray(groups, dtype=np.int64)
    if x0.ndim != 1 or group.shape != x0.shape or np.any(group < 0):
        raise ValueError("x0 must be (d,), and groups (d,) numbers from 0")
    n_groups = int(group.max(initial=0)) + 1
    rate_of: Rate = lr if callable(lr) else lambda worker, step, group: lr

    x, w = np.tile(x0, (m, 1)), np.ones(m)
    # The last step's messages: P without its diagonal, and the senders' values. All zero: nothing is in flight.
    shares, sent_x, sent_w = np.zeros((m, m)), np.zeros_like(x), np.zeros(m)
    state: list[Buffers] = [{} for _ in range(m)]
    anchor, u, v, gamma = x.copy(), np.zeros_like(x), np.zeros_like(x), np.zeros((m, n_groups))
    clock = 0
    own_steps = np.zeros(m, dtype=np.int64)  # every worker's step count
    batches_had = [0] * m
    rate_sums, rate_steps = np.zeros((m, n_groups)), np.zeros(m, dtype=np.int64)  # of the block; steps these cover

    def flying() -> tuple[Array, Array]:
        """Return the numerators (m, d) and weights (m,) in flight, by sender."""
        share = shares.sum(axis=0)
        return share[:, np.newaxis] * sent_x, share * sent_w

    def snapshot(outer: bool = False, joined: bool = False, behind: NDArray[np.int64] | None = None) -> GossipSnapshot:
        flying_x, flying_w = flying()
        behind = np.array(clock - own_steps) if behind is None else behind
        return GossipSnapshot(clock, x.copy(), w.copy(), x / w[:, np.newaxis], flying_x, flying_w, anchor.copy(),
                              v.copy(), gamma.copy(), outer, joined, behind)  # fmt: skip

    def inner_step(live: list[int], teams: Sequence[Sequence[int]]) -> None:
        """Take the inner step of each worker that is live or whose team, which averages its gradients, has a live one.

        All workers start from the z before the step.
        """
        for team in teams:
            active = [i for i in team if i in live]
            if not active:
                continue
            g = [np.array(gradient(i, batches_had[i], x[i] / w[i]), dtype=np.float64) for i in active]
            if any(g_i.shape != x0.shape for g_i in g):
                raise ValueError("a gradient must be (d,)")
            rates = {i: np.array([rate_of(i, clock, j) for j in range(n_groups)], dtype=np.float64) for i in active}
            for i in team:
                rate = rates.get(i, rates[active[0]])
                z_new = _BASES[base](x[i] / w[i], np.mean(g, axis=0), rate[group], state[i], **(base_options or {}))
                x[i] = z_new + (x[i] - x[i] / w[i])
                rate_sums[i] += rate
                rate_steps[i] += 1
                own_steps[i] += 1
            for i in active:
                batches_had[i] += 1

    def mix(step: int) -> None:
        """Mix as at this step, counted from the end of warm-up. Writes x and w."""
        nonlocal shares, sent_x, sent_w
        p = topology[step % len(topology)]
        if overlap:
            came_x, came_w = shares @ sent_x, shares @ sent_w
            shares, sent_x, sent_w = p - np.diag(np.diag(p)), x.copy(), w.copy()
            x[:] = np.diag(p)[:, np.newaxis] * x + came_x
            w[:] = np.diag(p) * w + came_w
        else:
            x[:] = p @ x
            if gossip == "sgp":
                w[:] = p @ w

    def meet() -> Array:
        """Return the mean (d,), messages in flight included; leave nothing in flight and w = 1. Does not write x."""
        flying_x, flying_w = flying()
        mean: Array = (x.sum(axis=0) + flying_x.sum(axis=0)) / (w.sum() + flying_w.sum())
        shares[:] = 0
        w[:] = 1
        return mean

    def outer_step() -> None:
        """Apply lines 6 to 8, for all workers together or for each one alone."""
        options: dict[str, Any] = {"alpha": alpha, "beta": beta, "nesterov": nesterov, "scale_by_lr": scale_by_lr}
        if average:
            gamma[:] = rate_sums.sum(axis=0) / rate_steps.sum()  # sum of sums / sum of steps
            anchor[:] = _outer_step(anchor[0], meet(), u[0], v[0], gamma[0], group, **options)
            x[:], u[:], v[:] = anchor, u[0], v[0]
            return
        for i in range(m):
            gamma[i] = rate_sums[i] / max(rate_steps[i], 1)
            anchor[i] = _outer_step(anchor[i], x[i] / w[i], u[i], v[i], gamma[i], group, **options)
            x[i] = w[i] * anchor[i]

    everyone, alone = [list(range(m))], [[i] for i in range(m)]
    teams = {"local": alone, "node": nodes or (), "all": everyone}[gradients]
    yield snapshot()
    for batches in rounds:
        for round_ in range(max(batches)):
            after_warmup = clock - warmup_steps
            begins = tau is not None and after_warmup >= 0 and after_warmup % tau == 0
            if begins and inner_state == "average":
                _mean_buffers(state)
            elif begins:
                _begin_block(inner_state, state)
            live = [i for i in range(m) if round_ < batches[i]]
            inner_step(live, everyone if after_warmup < 0 else teams)
            clock += 1
            outer = tau is not None and after_warmup >= 0 and (after_warmup + 1) % tau == 0
            if after_warmup >= 0 and not (outer and average):
                mix(after_warmup)
            if outer:
                outer_step()
                rate_sums[:] = rate_steps[:] = 0
            if clock == warmup_steps:
                if np.any(x != x[0]):
                    raise ValueError("the workers differ at the end of warm-up (do their rates?)")
                if tau is not None:
                    anchor[:] = x
                rate_sums[:] = rate_steps[:] = 0
            yield snapshot(outer=outer)
        if epochs is None:
            return
        if clock >= warmup_steps:
            x[:] = meet()
        elif np.any(x != x[0]):
            raise ValueError("the workers differ at a join in warm-up (do their rates?)")
        most = int(np.argmax(own_steps))  # the first of several
        rate_sums[:], rate_steps[:] = rate_sums[most], rate_steps[most]
        behind = np.array(clock - own_steps)
        own_steps[:] = clock
        yield snapshot(joined=True, behind=behind)
