"""Measurements of an outer step: how they are taken, and the form in which users get them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from hvd_slowmo.core.average.ledger import columns
from hvd_slowmo.core.average.meeting import Meeting
from hvd_slowmo.core.parts.layout import Chunk
from hvd_slowmo.core.parts.progress import Observed, Vector
from hvd_slowmo.core.parts.runtime import Runtime


class Metrics(NamedTuple):
    """Measurements of one outer step; norms and products are over all parameters of the fragment that met.

    `residual` and `local`, and those from `seconds_waited` on, are this worker's own; the others are equal on all.
    Without the average (noaverage) they are of this worker's own Delta and v, and the divergence stays 0, because no
    worker knows it. With `shard=True` all of them are of this worker's own slice of the parameters that are divided, a
    different one on each worker, and the divergence is of this outer step; in few bits it is of what was sent.

    Example:
        >>> seen = Observed(drift=0, mean=1, divergence=0, delta=4, v=0, product=0, residual=1, local=0)
        >>> metrics_of(seen, 12, seconds_waited=0.5, seconds_exchanging=2.0, bytes_sent=4096).hidden
        0.75
    """

    step: int  # inner steps completed, this outer step included
    divergence: float  # of the outer step before this one: mean over workers of |x_i - mean|^2 / |mean|^2
    delta_norm: float  # of Delta, the outer gradient; 0 for Local SGD, which has no anchor
    v_norm: float  # of the slow momentum, as it was before this step
    cosine: float  # of the angle between Delta and that momentum; 0 while there is none
    residual: float  # in few bits: norm of what rounding has withheld on this worker before, by that of Delta
    local: float  # with a delay: norm of what this worker has trained meanwhile, by that of Delta
    seconds_waited: float  # for collectives on this worker, since the outer step before
    hidden: float  # share of the exchanges' time for which this worker did not wait; 0 under Keras, which can't tell
    bytes_sent: int  # handed to the transport by this worker, since the outer step before


def metrics_of(seen: Observed, step: int, seconds_waited: float, seconds_exchanging: float, bytes_sent: int) -> Metrics:
    """Return the measurements of an outer step in a user's terms.

    Args:
        seconds_exchanging: in which collectives were under way, waited for or not.
    """
    norms, delta = math.sqrt(seen.delta * seen.v), math.sqrt(seen.delta)
    return Metrics(
        step=step,
        divergence=seen.divergence,
        delta_norm=delta,
        v_norm=math.sqrt(seen.v),
        cosine=seen.product / norms if norms else 0.0,
        residual=math.sqrt(seen.residual) / delta if delta else 0.0,
        local=math.sqrt(seen.local) / delta if delta else 0.0,
        seconds_waited=seconds_waited,
        hidden=max(0.0, 1 - seconds_waited / seconds_exchanging) if seconds_exchanging else 0.0,
        bytes_sent=bytes_sent,
    )


class Observer:
    """Takes the measurements of one outer step, chunk by chunk; zeros where the runtime does not observe."""

    def __init__(self, runtime: Runtime, observed: Vector) -> None:
        self._runtime = runtime
        self._before = observed
        self._seen = observed * 0

    def chunk(self, chunk: Chunk, mean: Any, vector: str = "model") -> None:
        """Measure a chunk of parameters before anything of it is written.

        Args:
            mean: of the workers; without the average, this worker's own parameters. Where the outer state is divided
                it is not looked at: see `slice`.
            vector: name of the one whose mean it is.
        """
        ops, store, vectors = self._runtime.ops, self._runtime.store, self._runtime.config.vectors
        if self._runtime.config.shards:
            return
        away = store.read(vector, chunk) - mean
        parts = [ops.dot(away, away), ops.dot(mean, mean), *[0.0] * 6]
        if vectors:
            delta = store.read("anchor", chunk) - mean
            parts[3] = ops.dot(delta, delta)
            if "v" in vectors:
                v = store.read("v", chunk)
                parts[4:6] = [ops.dot(v, v), ops.dot(delta, v)]
        self._seen = self._seen + ops.vector(parts)

    def slice(self, observed: Vector) -> None:
        """Take the measurements of this worker's slice of a chunk, of which it has taken the outer step."""
        self._seen = self._seen + observed

    def own(self, fragment: int, late: bool) -> None:
        """Measure what this worker owes of a fragment and has trained meanwhile, before anything of it is written."""
        runtime, store, ops = self._runtime, self._runtime.store, self._runtime.ops
        owes = "residual" in runtime.config.vectors
        if not runtime.observe or not (owes or late):
            return
        for chunk in runtime.layout.of_fragment(fragment):
            # Relative to Delta, which is of this worker's slice where the outer state is divided.
            part = runtime.slices.part(chunk) if runtime.config.shards else chunk
            if chunk.role != "parameter" or part is None:
                continue
            seen: list[Any] = [0.0] * len(Observed._fields)
            if owes:
                residual = store.read("residual", part)
                seen[6] = ops.dot(residual, residual)
            if late:
                trained = store.read("model", part) - store.read("in_flight", part)
                seen[7] = ops.dot(trained, trained)
            self._seen = self._seen + ops.vector(seen)

    def completed(self, meeting: Meeting | None = None) -> Vector:
        """Return the measurements, with the divergence of the outer step before, which the ledger completes.

        Where the outer state is divided a worker has that of its slice at once.
        """
        if not self._runtime.observe or meeting is None:
            return self._seen
        ops, sliced = self._runtime.ops, self._runtime.config.shards
        seen = self._seen if sliced else self._before
        mean, drift = seen[Observed._fields.index("mean")], seen[Observed._fields.index("drift")]
        measured = mean > 0
        size = ops.where(measured, mean, 1.0) * self._runtime.comm.size
        drift = drift if sliced else ops.sum(columns(meeting.table).drift)
        divergence = ops.where(measured, drift / size, 0.0)
        return self._seen + ops.vector([0.0, 0.0, divergence, *[0.0] * 5])
