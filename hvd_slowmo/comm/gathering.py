"""Gathers of small items: one that is too large raises on every worker, with its size, before it is sent."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

LARGEST = 64 * 2**20
"""The most bytes of one worker's item."""

LARGEST_TOTAL = 2**30
"""The most bytes of all items, which every worker holds at once. Libraries that count in 32 bits end at twice that."""


def bounded_gather(gather: Callable[[str, Any], list[Any]], ranks: Sequence[int], name: str, item: Any) -> list[Any]:
    """Return every worker's item, by rank. A collective.

    A worker whose item is too large sends the size in its place, so that all of them hear of it.

    Args:
        gather: of a `Comm`.
        ranks: global ranks of its workers.
        name: of the collective.
        item: picklable.

    Raises:
        ValueError: on every worker, if one's item is too large.

    Example:
        >>> bounded_gather(lambda name, item: [item, item], (0, 1), "facts", 3)
        [3, 3]
    """
    if len(ranks) == 1:
        return gather(name, item)
    sink = _Sink(min(LARGEST, LARGEST_TOTAL // len(ranks)))
    pickle.Pickler(sink, pickle.HIGHEST_PROTOCOL).dump(item)
    everyone = gather(name, sink.size if sink.parts is None else b"".join(sink.parts))
    for rank, each in zip(ranks, everyone, strict=True):
        if isinstance(each, int):
            raise ValueError(
                f"{name}: rank {rank} has {each / 2**20:.1f} MiB to gather, and {sink.limit / 2**20:.1f} MiB is the "
                f"most with {len(ranks)} workers, since every worker holds the items of all. Give fewer or smaller "
                "values."
            )
    return [pickle.loads(each) for each in everyone]


class _Sink:
    """A file that counts all bytes and keeps them up to a limit: a large item is measured without a copy of it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self.parts: list[bytes] | None = []

    def write(self, data: bytes | memoryview) -> int:
        length = memoryview(data).nbytes
        self.size += length
        if self.size > self.limit:
            self.parts = None
        elif self.parts is not None:
            self.parts.append(bytes(data))
        return length
