"""The roll call: after an exchange every worker knows whether all of them train, and whether one has been asked to end.

Collectives that are no part of a step (a save) need a step after which every worker comes to them. A worker in a join
comes to no such place, and only the table of an exchange tells the others that it is in one.
"""

from __future__ import annotations

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.ops import Ops
from hvd_slowmo.core.parts.progress import Scalar
from hvd_slowmo.core.parts.schedule import step_plan


class RollCall:
    """One worker's knowledge about all of them.

    Args:
        config: the settings.
        ops: of the worker; it makes the cells, so not in a trace.
        size: number of workers.

    Attributes:
        wish: whether this worker has been asked to end; the next exchange tells the others.

    Example:
        >>> from hvd_slowmo.core.parts.ops import EagerOps
        >>> roll = RollCall(SlowMoConfig(tau=2), EagerOps(), size=3)
        >>> roll.note(step=2, training=3.0, ending=1.0)
        >>> roll.together(2), roll.together(3), roll.asked
        (True, False, True)
        >>> roll.note(step=4, training=2.0, ending=0.0)
        >>> roll.together(4), roll.asked
        (False, True)
    """

    def __init__(self, config: SlowMoConfig, ops: Ops, size: int) -> None:
        self._config, self._ops, self._size = config, ops, size
        self.wish = ops.cell(False)
        self._asked = ops.cell(False)
        self._met = ops.cell(0)  # step of the last meeting of which all workers came from a step, or out of a join
        self._attended = ops.cell(False)  # the same of the last exchange of all workers' gradients

    def ending(self) -> Scalar:
        """Return this worker's entry in a table: 1 if it has been asked to end."""
        return self._ops.where(self.wish.get(), 1.0, 0.0)

    def note(self, step: Scalar, training: Scalar, ending: Scalar) -> None:
        """Note a meeting after which every worker goes on at once.

        Args:
            step: completed steps, this one included.
            training: number of workers that train.
            ending: number of workers that have been asked to end.
        """
        self._met.set(self._ops.where(training == self._size, step, self._met.get()))
        self.note_ending(ending)

    def note_attendance(self, training: Scalar, ending: Scalar) -> None:
        """Note an exchange of all workers' gradients, of the step that follows."""
        self._attended.set(training == self._size)
        self.note_ending(ending)

    def note_ending(self, ending: Scalar) -> None:
        """Note the number of workers that have been asked to end, in an exchange that tells nothing else."""
        self._asked.set(self._asked.get() | (ending > 0))

    def joined(self, step: int) -> None:
        """Note the end of a join at this step: all workers are there. Not in a trace."""
        self._met.set(step)

    def together(self, step: int) -> bool:
        """Return whether every worker is known to have just completed this step, so that a collective may begin.

        The same on all workers; not in a trace.
        """
        if self._size == 1 or int(self._met.get()) == step:
            return True
        return step > 0 and bool(step_plan(self._config, step - 1).all_gradients) and bool(self._attended.get())

    @property
    def asked(self) -> bool:
        """True if some worker has been asked to end, the same on all workers after an exchange; not in a trace."""
        return bool(self._asked.get()) or (self._size == 1 and bool(self.wish.get()))
