"""The end of a join where gradients are averaged, the same in every framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvd_slowmo.comm import Comm
from hvd_slowmo.machine import Machine
from hvd_slowmo.ops import Ops


def catch_up(
    machine: Machine,
    ops: Ops,
    comm: Comm,
    uneven: Any,
    source: Any,
    everyone: bool,
    hand_over: Callable[[], None] | None = None,
) -> None:
    """All workers that average gradients are done: those that were done earlier become equal to the last one.

    They have taken its steps, but what its script did to the gradients or the settings in between, they could not
    know: clipping, say. Or their framework rounds otherwise. A collective of those workers.

    Args:
        comm: the workers that average gradients.
        uneven: whether one of them was done before the others.
        source: the last one, its rank in `comm`.
        everyone: whether these are all workers, which then average their statistics too.
        hand_over: gives everybody the base optimizer's state of the last one, where that is possible.
    """

    def take() -> Any:
        machine.take_from(source, comm=comm)
        if hand_over is not None:
            hand_over()
        return ops.integer(1.0)

    taken = ops.cond(uneven, take, lambda: ops.integer(0.0))
    if everyone:
        ops.after(taken, machine.average_statistics)
