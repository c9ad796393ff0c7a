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


class Flight(NamedTuple):
    """Exchanges in flight, by fragment of the parameters. D: number of fragments; 0 where nothing is late.

    The model as it was sent is the vector "in_flight".
    """

    launched: Vector  # int64 (D,): number of steps after which the exchange started; 0: there is none
    sent_since: Vector  # int64 (D,): `since` as it was sent
    sent_rate_steps: Vector  # int64 (D,): `rate_steps`
    sent_rate_sums: Vector  # float64 (D, G): `rate_sums`


class Observed(NamedTuple):
    """Measurements of an outer step, over all parameters. The divergence is known at the next meeting."""

    drift: Scalar  # this worker's squared distance from the mean
    mean: Scalar  # squared norm of the mean
    divergence: Scalar  # of the outer step before: mean over workers of the squared distance / squared norm of the mean
    delta: Scalar  # squared norm of Delta
    v: Scalar  # squared norm of v, as it was before
    product: Scalar  # inner product of Delta and that v
    residual: Scalar  # squared norm of what rounding to few bits has withheld on this worker
    local: Scalar  # squared norm of what this worker has trained while a late exchange was under way


class Progress(NamedTuple):
    """The scalar state of a worker. G: number of parameter groups, F: of fragments, each of which has its own block.

    The position in the schedule (warm-up, place in the block, next event) follows from `step` alone; see schedule.py.
    """

    step: Scalar  # int64: inner steps completed
    since: Vector  # int64 (F,): own inner steps since the last average
    rate_steps: Vector  # int64 (F,): steps of this block that `rate_sums` covers
    rate_sums: Vector  # float64 (F, G): sum of the inner learning rates over those steps
    gamma: Vector  # float64 (F, G): mean inner learning rate of the block before; 0 while there is none
    excluded: Scalar  # int64: averages that left this worker out because its parameters were not finite
    observed: (
        Vector  # float64 (8,): measurements of the last outer step, see `Observed`; zeros where nothing is measured
    )
    mixing: PushSum  # of the gossip between outer steps
    flight: Flight  # of the exchanges that are late

    def flat(self) -> dict[str, Any]:
        """Return all scalars and vectors by name, those of `mixing` and `flight` too; the names in checkpoints."""
        own = {name: getattr(self, name) for name in _OWN}
        return {**own, **self.mixing._asdict(), **self.flight._asdict()}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Progress:
        """Return the state with these values; the inverse of `flat`."""
        own = {name: values[name] for name in _OWN}
        mixing = PushSum(**{name: values[name] for name in PushSum._fields})
        return cls(**own, mixing=mixing, flight=Flight(**{name: values[name] for name in Flight._fields}))


_OWN = Progress._fields[:-2]
FIELDS = (*_OWN, *PushSum._fields, *Flight._fields)
"""Names of `Progress.flat()`, in its order."""
PER_FRAGMENT = ("since", "rate_steps", "rate_sums", "gamma")
"""Those with a leading axis of the fragments."""
INTEGERS = ("since", "rate_steps", "launched", "sent_since", "sent_rate_steps")
"""Vectors of int64; the others are float64."""
PER_GROUP = ("rate_sums", "gamma", "sent_rate_sums")
"""Those with a last axis of the parameter groups."""
