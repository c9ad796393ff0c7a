"""Exchanges of the workers: the reason for one, and a worker's part in one that has begun."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from hvd_slowmo.core.average.ledger import AVERAGE, TRAINING
from hvd_slowmo.core.parts.progress import Progress, Scalar, Vector
from hvd_slowmo.core.parts.store import Condition


@dataclass(frozen=True)
class Purpose:
    """The reason for which a worker comes to a meeting.

    Attributes:
        training: 1, or 0 in a join.
        counts: 0 if this worker has only followed the others' steps, so that its parameters weigh nothing.
        leaving: 1: it joins for the last time.
        reason: TRAINING or AVERAGE of the ledger.
        ledger_alone: the first chunk does not travel with the ledger: whether an average follows is not known yet.
        fragment: of the parameters that the meeting is about; None for all.
        late: the model is taken as it was set aside ("in_flight"), and exchanged beside the training.
        beside_late: the others exchange this meeting late, so that this worker does too.
        following: with a delay, of an average of all: the fragment that meets next, whose ledger's name is used.
            Workers that exchange that fragment instead see this worker's row.
    """

    training: int = 1
    counts: int = 1
    leaving: Scalar = 0
    reason: int = TRAINING
    ledger_alone: bool = False
    fragment: int | None = 0
    late: bool = False
    beside_late: bool = False
    following: int | None = None

    @property
    def beside(self) -> bool:
        """True if all chunks start together, from copies: an adapter has memory to put two of them together."""
        return self.late or self.beside_late

    @property
    def vector(self) -> str:
        """Name of the vector that is averaged."""
        return "in_flight" if self.late else "model"


PLAIN_AVERAGE = Purpose(reason=AVERAGE, fragment=None)
"""A meeting in which every worker weighs the same."""


class Exchange(NamedTuple):
    """A meeting that has begun."""

    purpose: Purpose
    ledger: Any  # its handle; beside the training, that of all together
    started: tuple[Any, ...]  # handles of the first chunks, in their order
    weights: Vector  # this worker's, per fragment
    counted: Scalar  # its weight in plain means
    finite: Scalar  # 1: this worker's parameters are
    condition: Condition
    progress: Progress  # this worker's state
    arrived: tuple[Any, ...] = ()  # results in the place of handles: of the ledger and of the first chunks
