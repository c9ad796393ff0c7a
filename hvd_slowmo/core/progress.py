"""The scalar state of a worker, passed by value through the state machine's transitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Scalar = Any
"""A Python or NumPy number, or a traced scalar tensor."""
Vector = Any
"""A float64 vector: NumPy's, or a traced tensor."""


class PushSum(NamedTuple):
    """Push-sum weights of all workers, and whether messages are in flight. m: number of workers; 0 without gossip.

    The sum of `weights` and `arriving` is m.
    """

    weights: Vector  # float64 (m,)
    arriving: Vector  # float64 (m,): weights in flight, by receiver
    in_flight: Scalar  # int64: 1 + the number of the step whose messages nobody has mixed yet; 0: there are none


class Observed(NamedTuple):
    """Measurements of an outer step, over all parameters. The divergence is known at the next meeting."""

    drift: Scalar  # this worker's squared distance from the mean
    mean: Scalar  # squared norm of the mean
    divergence: Scalar  # of the outer step before: mean over workers of the squared distance / squared norm of the mean
    delta: Scalar  # squared norm of Delta
    v: Scalar  # squared norm of v, as it was before
    product: Scalar  # inner product of Delta and that v


class Progress(NamedTuple):
    """The scalar state of a worker. G: number of parameter groups.

    The position in the schedule (warm-up, place in the block, next event) follows from `step` alone; see schedule.py.
    """

    step: Scalar  # int64: inner steps completed
    since: Scalar  # int64: own inner steps since the last average
    rate_steps: Scalar  # int64: steps of this block that `rate_sums` covers
    rate_sums: Vector  # float64 (G,): sum of the inner learning rates over those steps
    gamma: Vector  # float64 (G,): mean inner learning rate of the block before; 0 while there is none
    excluded: Scalar  # int64: averages that left this worker out because its parameters were not finite
    observed: (
        Vector  # float64 (6,): measurements of the last outer step, see `Observed`; zeros where nothing is measured
    )
    mixing: PushSum  # of the gossip between outer steps

    def flat(self) -> dict[str, Any]:
        """Return all scalars and vectors by name, those of `mixing` among them; the names in checkpoints."""
        return {**{name: getattr(self, name) for name in Progress._fields[:-1]}, **self.mixing._asdict()}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Progress:
        """Return the state with these values; the inverse of `flat`."""
        own = {name: values[name] for name in Progress._fields[:-1]}
        return cls(**own, mixing=PushSum(**{name: values[name] for name in PushSum._fields}))


FIELDS = (*Progress._fields[:-1], *PushSum._fields)
"""Names of `Progress.flat()`, in its order."""
PER_GROUP = ("rate_sums", "gamma")
"""Those with a value per parameter group."""
