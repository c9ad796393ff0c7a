"""The scalar state of a worker."""

from __future__ import annotations

from typing import Any, NamedTuple


class Progress(NamedTuple):
    """The scalar state of a worker. G: number of parameter groups."""

    step: Any  # int64: inner steps completed
    since: Any  # int64: own inner steps since the last average
    covered: Any  # int64: steps of this block that `rates` covers
    rates: Any  # float64 (G,): sum of the base rates over those steps
    gamma: Any  # float64 (G,): mean base rate of the block before; 0 while there is none
    excluded: Any  # int64: averages that left this worker out because its parameters were not finite
    observed: Any  # float64 (6,): what the last outer step has measured, see `Observed`; zeros where nothing is
    # Over a gossip base, see `hvd_slowmo.core.mixing.Mass`. m: number of workers; 0 over another base.
    w: Any  # float64 (m,)
    arriving: Any  # float64 (m,)
    flight: Any  # int64


class Observed(NamedTuple):
    """What an outer step measures, over all parameters. The divergence is known when the workers meet again."""

    drift: Any  # this worker's squared distance from the mean
    mean: Any  # squared norm of the mean
    divergence: Any  # of the outer step before: mean over workers of the squared distance / squared norm of the mean
    delta: Any  # squared norm of Delta
    v: Any  # squared norm of v, as it was before
    product: Any  # inner product of Delta and that v
