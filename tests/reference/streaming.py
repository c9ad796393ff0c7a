"""The oracle for streamed and late outer steps: Algorithm 1 per fragment of the parameters (the rest: slowmo.py).

The parameters are dealt into F fragments. Fragment f meets after steps ceil((f + 1) tau / F), modulo tau, counted from
the end of the warm-up. An exchange that starts after step s is applied after step s + d: x <- anchor + (x - y), with y
the parameters as they were sent. Within one step, first what is due is applied, then what meets is started.

Workers are simulated in lockstep, as in join.py: in a round every live worker takes one inner step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference.slowmo import _BASES, Array, Buffers, Gradient, Rate, _checked, _outer_step


@dataclass(frozen=True, eq=False)
class StreamedSnapshot:
    """The state after a step, or after the join that ends an epoch. All copies.

    x: (m, d); anchor, v: (d,); gamma: (F, G), of each fragment's last block.
    step: the common step count, warm-up included.
    """

    x: Array
    anchor: Array
    v: Array
    gamma: Array
    step: int


@dataclass(frozen=True, eq=False)
class _Sent:
    """An exchange in flight: parameters (m, d), steps since the last (m,), sums of rates (m, G), their steps (m,)."""

    y: Array
    since: NDArray[np.int64]
    rate_sums: Array
    rate_steps: NDArray[np.int64]
    clock: int


def run_streamed(
    x0: Array,
    gradient: Gradient,
    *,
    workers: int,
    lr: float | Rate,
    fragment: NDArray[np.integer[Any]],
    steps: int | None = None,
    epochs: Sequence[Sequence[int]] | None = None,
    fragments: int = 1,
    delay: int = 0,
    base: str = "sgd",
    base_options: Mapping[str, Any] | None = None,
    groups: NDArray[np.integer[Any]] | None = None,
    tau: int = 12,
    alpha: float = 1.0,
    beta: float = 0.5,
    nesterov: bool = False,
    scale_by_lr: bool = True,
    gradients: str = "local",
    warmup_steps: int = 0,
) -> list[StreamedSnapshot]:
    """Return the start and the state after each of `steps`, or after the join of each epoch.

    fragment: (d,) integers 0..F-1, the fragment of each coordinate.
    epochs: epochs[e][i] is the number of batches of worker i in epoch e, as in `run_epochs`.
    Everything else is as for reference.run. The inner state is maintained.

    Join: what is in flight is applied; then, in each fragment in which a worker has steps since the last average, all
    take the mean weighted by these steps. All workers have the step count, the sums of rates and their steps of the
    worker with the most steps.
    """
    m = workers
    x0, group, rate_of = _checked(x0, groups, lr, m, tau, warmup_steps, base, "maintain", gradients)
    n_groups = int(group.max(initial=0)) + 1
    offsets = [math.ceil((f + 1) * tau / fragments) % tau for f in range(fragments)]

    x = np.tile(x0, (m, 1))
    state: list[Buffers] = [{} for _ in range(m)]
    anchor, u, v = x0.copy(), np.zeros_like(x0), np.zeros_like(x0)
    gamma = np.zeros((fragments, n_groups))
    since, rate_steps = (np.zeros((m, fragments), dtype=np.int64) for _ in range(2))
    rate_sums = np.zeros((m, fragments, n_groups))
    flights: dict[int, _Sent] = {}
    clock, counts, batches = 0, np.zeros(m, dtype=np.int64), [0] * m
    history = [StreamedSnapshot(x.copy(), anchor.copy(), v.copy(), gamma.copy(), 0)]

    def take_steps(live: Sequence[int]) -> None:
        everyone = clock < warmup_steps or gradients == "all"
        g = {i: np.array(gradient(i, batches[i], x[i].copy()), dtype=np.float64) for i in live}
        mean = np.mean([g[i] for i in live], axis=0)
        for i in live:
            batches[i] += 1
        for i in range(m) if everyone else live:
            rates = np.array([rate_of(live[0] if i not in live else i, clock, j) for j in range(n_groups)])
            own = mean if everyone else g[i]
            x[i] = _BASES[base](x[i].copy(), own, rates[group], state[i], **(base_options or {}))
            rate_sums[i] += rates
            rate_steps[i] += 1
            since[i] += 1
            counts[i] += 1

    def start(f: int) -> None:
        flights[f] = _Sent(x.copy(), since[:, f].copy(), rate_sums[:, f].copy(), rate_steps[:, f].copy(), clock)
        since[:, f] = rate_sums[:, f] = rate_steps[:, f] = 0

    def apply(f: int) -> None:
        sent, c = flights.pop(f), fragment == f
        gamma_t = sent.rate_sums.sum(axis=0) / sent.rate_steps.sum()
        mean = (sent.since[:, np.newaxis] * sent.y).sum(axis=0) / sent.since.sum()
        own_u, own_v = u[c], v[c]
        anchor[c] = _outer_step(
            anchor[c], mean[c], own_u, own_v, gamma_t, group[c], alpha=alpha, beta=beta, nesterov=nesterov,
            scale_by_lr=scale_by_lr,
        )  # fmt: skip
        u[c], v[c] = own_u, own_v
        if np.any(gamma_t != 0):
            gamma[f] = np.where(gamma_t != 0, gamma_t, gamma[f])
        x[:, c] = anchor[c] + (x[:, c] - sent.y[:, c])

    def after_step() -> None:
        after = clock - warmup_steps
        if after == 0 and warmup_steps:
            anchor[:] = x[0]
            since[:] = rate_sums[:] = rate_steps[:] = 0
        for f in range(fragments):
            if f in flights and clock - flights[f].clock == delay:
                apply(f)
        for f, offset in enumerate(offsets):
            if after > 0 and after % tau == offset:
                start(f)
                if not delay:
                    apply(f)

    def join() -> None:
        for f in sorted(flights, key=lambda f: flights[f].clock):
            apply(f)
        for f in range(fragments):
            c = fragment == f
            if since[:, f].any() and (gradients == "local" or np.any(x != x[0])):
                x[:, c] = (since[:, f][:, np.newaxis] * x[:, c]).sum(axis=0) / since[:, f].sum()
        since[:] = 0
        most = int(counts.argmax())
        rate_sums[:], rate_steps[:], counts[:] = rate_sums[most], rate_steps[most], counts[most]

    for lengths in epochs if epochs is not None else [(steps or 0,) * m]:
        left = list(lengths)
        while any(left):
            take_steps([i for i in range(m) if left[i]])
            left = [max(0, n - 1) for n in left]
            clock += 1
            after_step()
            if epochs is None:
                history.append(StreamedSnapshot(x.copy(), anchor.copy(), v.copy(), gamma.copy(), clock))
        if epochs is not None:
            join()
            history.append(StreamedSnapshot(x.copy(), anchor.copy(), v.copy(), gamma.copy(), clock))
    return history
