"""A join, the same in every framework: what a worker that is done takes part in until all are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.core.machine import Machine
from hvd_slowmo.core.ops import Ops


class Joined(NamedTuple):
    """What `SlowMo.join` returns."""

    behind: int  # by how many steps this worker was behind the one with the most
    left: Sequence[int]  # ranks that have left for good: stop training


def take_part(
    ops: Ops,
    due: Callable[[Any], Any],
    exchange: Callable[[Any], tuple[Any, Any, Any]],
    meet: Callable[[], tuple[Any, Any]],
    nobody: Any,
) -> Any:
    """Answer the others' exchanges in the order in which the schedule has them, until the join is over.

    Args:
        due: whether the others exchange gradients next; given whether this node's workers are all done, who then
            exchange none any more.
        exchange: takes part in that; given who leaves as far as is known, returns that, whether the join goes on, and
            whether this node's workers are all done: (going, node_done, left).
        meet: takes part in the next meeting, `Machine.idle`: (going, left).
        nobody: float64 (workers,), zeros.

    Returns:
        Who leaves, float64 (workers,).
    """

    def met(node_done: Any) -> tuple[Any, Any, Any]:
        going, left = meet()
        return going, node_done, left

    def once(going: Any, node_done: Any, left: Any) -> tuple[Any, Any, Any]:
        return ops.cond(due(node_done), lambda: exchange(left), lambda: met(node_done))

    _, _, left = ops.loop(lambda going, *_: going, once, (True, False, nobody))
    return left


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
