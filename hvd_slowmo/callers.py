"""Modules of other libraries whose functions call an optimizer for ends of their own."""

from __future__ import annotations

import sys
from collections.abc import Set
from types import FrameType


def calling_modules(names: Set[str], depth: int) -> list[str]:
    """Return the names of those modules whose functions are at work, the innermost first.

    The function that asks is left out, and so is the method that has called it.

    Args:
        names: of the modules that matter; nothing is looked at before one of them is imported.
        depth: number of functions to look at.

    Example:
        >>> calling_modules({"not_imported"}, 8)
        []
    """
    if sys.modules.keys().isdisjoint(names):  # a step costs microseconds, and a look at its callers one of them
        return []
    frame: FrameType | None = sys._getframe(3)
    found: list[str] = []
    for _ in range(depth):
        if frame is None:
            break
        if (name := frame.f_globals.get("__name__", "")) in names:
            found.append(name)
        frame = frame.f_back
    return found
