"""An adapter's part when workers come together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from hvd_slowmo.core.parts.layout import Ref
from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.core.regroup.dealing import FormerSlices
from hvd_slowmo.core.regroup.places import Place
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.core.start.startup import Description, StartingWorker
from hvd_slowmo.core.step.machine import Machine

R = TypeVar("R", bound=Ref)


@dataclass
class BrokenOff:
    """Remains of a loss on a worker, until all have come together.

    Attributes:
        torn: it was taking the others' state, of which it may have parts; see `Place`.
        answered: steps at which it has answered an exchange whose step it had not made; None where that is over.
    """

    torn: bool = False
    answered: int | None = None


class Member(StartingWorker[R], Protocol):
    """An adapter's part."""

    @property
    def broken_off(self) -> BrokenOff:
        """Return the worker's record, which is changed here."""

    @property
    def machine(self) -> Machine:
        """The state machine, of the workers that were assembled last."""

    def place(self) -> Place:
        """Return where this worker is."""

    def reassemble(self, description: Description[R], graph: Graph | None) -> None:
        """Make everything that a step needs with the present workers; model, vectors and position stay."""

    def former_slices(self) -> FormerSlices | None:
        """Return what this worker has kept in slices so far; None if there is nothing."""

    def forget_former_slices(self) -> None:
        """Free them: they have been dealt anew."""

    def read_progress(self) -> Progress:
        """Return the scalar state."""

    def write_progress(self, progress: Progress, interrupted: bool = False) -> None:
        """Replace the scalar state, and whether an inner step beyond it has been made."""

    def count_step(self) -> None:
        """Count an inner step that has been made, and whose exchange was broken off, without what follows it."""

    def finish_step(self) -> None:
        """Count an inner step that nobody has counted yet, and run the exchange that was broken off after it."""
