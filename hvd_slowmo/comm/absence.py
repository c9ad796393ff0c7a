"""Finding the workers that are gone, or that have not come, after a collective has failed on the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

_SECONDS = 1.0
"""Time in which the others report. Each of them has noticed: the first that fails ends the exchange of all."""

_PAUSE_S = 0.02


class Board(Protocol):
    """A place outside of the failed transport where workers leave marks."""

    def mark(self, key: str) -> None:
        """Leave a mark."""

    def marked(self, key: str) -> bool:
        """Return whether somebody has left this mark."""


def absent_ranks(ranks: Sequence[int], own: int, board: Board) -> tuple[int, ...]:
    """Report this worker to the others, and return the ranks that don't report themselves within a second.

    The error of a transport has an address at best.

    Args:
        ranks: global ranks of the workers.
        own: place of this worker in `ranks`.
        board: where they report.

    Returns:
        Nothing where the board can't be reached: it may have been on the worker that is gone.

    Example:
        >>> class Marks(set):
        ...     mark, marked = set.add, set.__contains__
        >>> absent_ranks((0, 1, 2), 0, Marks({"0_1_2/2"}))
        (1,)
    """
    try:
        absent = {rank: f"{'_'.join(map(str, ranks))}/{rank}" for rank in ranks}
        board.mark(absent.pop(ranks[own]))
        end = time.monotonic() + _SECONDS
        while absent and time.monotonic() < end:
            absent = {rank: key for rank, key in absent.items() if not board.marked(key)}
            time.sleep(_PAUSE_S)
    except Exception:  # whatever becomes of a board whose owner is gone
        return ()
    return tuple(absent)
