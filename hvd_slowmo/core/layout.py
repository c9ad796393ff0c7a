"""What travels, laid out once: parameters and averaged buffers as flat vectors, cut into chunks.

A segment is one flat vector of one type on one device, with a rule. A chunk is a stretch of a segment, one message on
the wire. Within a chunk, a piece is a stretch of one parameter group: its rate is one number.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")

CHUNK_BYTES = 16 * 2**20
"""Length of a message. Long enough that the network's speed counts and not the number of messages (3 to 9 ms each on
loopback), short enough that the update of one chunk runs while the next travels; see benchmarks/."""

RULES = ("slow", "mean", "base")
"""See `Segment`."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a segment."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # the tensor's own; the wire's is the segment's
    group: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Segment:
    """Tensors that travel as one flat vector of `dtype` on `device`.

    rule: "slow" for parameters of one type (outer update), "mean" for statistics (the workers' mean), "base" for the
        base optimizer's buffers (the mean too, at the beginning of a block only).
    """

    rule: str
    dtype: str
    itemsize: int  # bytes per element on the wire
    device: str
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.offsets[-1]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each entry begins, and last where the segment ends."""
        return (0, *accumulate(entry.size for entry in self.entries))


@dataclass(frozen=True)
class Chunk:
    """Elements start .. stop - 1 of a segment; `group` is a piece's one parameter group, None for a whole chunk."""

    index: int
    segment: int
    rule: str
    start: int
    stop: int
    pieces: tuple[Chunk, ...] = field(default=(), repr=False)
    group: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def blocks(self, length: int | None) -> Iterator[Chunk]:
        """The pieces, cut into blocks of at most `length` elements."""
        for piece in self.pieces:
            for start in range(piece.start, piece.stop, length or piece.size):
                stop = min(start + (length or piece.size), piece.stop)
                yield Chunk(self.index, self.segment, self.rule, start, stop, group=piece.group)

    def cut(self, values: Any, block: Chunk) -> Any:
        """Of this chunk's values, those of a block of it."""
        return values[block.start - self.start : block.stop - self.start]


@dataclass(frozen=True)
class Layout:
    """All segments of a model, and their chunks in the order in which they travel."""

    segments: tuple[Segment, ...]
    chunks: tuple[Chunk, ...]
    groups: int

    def spans(self, chunk: Chunk) -> Iterable[tuple[int, int, int, int]]:
        """The tensors under a chunk: (entry's number, from, to within the tensor, place within the chunk)."""
        offsets = self.segments[chunk.segment].offsets
        number = bisect_right(offsets, chunk.start) - 1
        while offsets[number] < chunk.stop:
            start, stop = max(chunk.start, offsets[number]), min(chunk.stop, offsets[number + 1])
            if start < stop:
                yield number, start - offsets[number], stop - offsets[number], start - chunk.start
            number += 1

    def describe(self) -> list[tuple[Any, ...]]:
        """What workers must agree on, entry by entry, in wire order."""
        return [
            (segment.rule, entry.name, list(entry.shape), entry.dtype, entry.group)
            for segment in self.segments
            for entry in segment.entries
        ]


class Tensor(NamedTuple, Generic[T]):
    """One tensor that takes part, as an adapter names it."""

    rule: str  # see `Segment`
    entry: Entry
    wire: str  # the type in which it travels
    itemsize: int  # of that type, in bytes
    device: str
    place: T  # where the adapter finds it again


def arrange(tensors: Iterable[Tensor[T]], groups: int) -> tuple[Layout, tuple[tuple[T, ...], ...]]:
    """Which tensors travel together: those of one rule, type and device, in the order given.

    Parameters of different types have segments of their own, whatever their wire types: what is written back is rounded
    to the parameters' type. Statistics of all types travel together. Segments stand in the order of rules and types, so
    that the order of the tensors does not change how long the messages are.

    Returns:
        The layout, and for each of its segments the places of its tensors.
    """
    together: dict[tuple[str, ...], list[Tensor[T]]] = {}
    for tensor in tensors:
        own = tensor.wire if tensor.rule == "mean" else tensor.entry.dtype
        together.setdefault((tensor.rule, tensor.wire, own, tensor.device), []).append(tensor)
    keys = sorted(together, key=lambda key: (RULES.index(key[0]), *key[1:3]))  # stable: devices in their order
    filled = [together[key] for key in keys if sum(tensor.entry.size for tensor in together[key])]
    segments = [Segment(t[0].rule, t[0].wire, t[0].itemsize, t[0].device, tuple(x.entry for x in t)) for t in filled]
    return layout(segments, groups), tuple(tuple(tensor.place for tensor in found) for found in filled)


def layout(segments: Sequence[Segment], groups: int) -> Layout:
    """Cut segments into chunks of at most CHUNK_BYTES. Segments without an element take no part."""
    chunks: list[Chunk] = []
    kept = tuple(segment for segment in segments if segment.size)
    for number, segment in enumerate(kept):
        length = max(1, CHUNK_BYTES // segment.itemsize)
        runs = _runs(segment)
        for start in range(0, segment.size, length):
            stop = min(start + length, segment.size)
            index = len(chunks)
            pieces = tuple(
                Chunk(index, number, segment.rule, max(start, a), min(stop, b), group=group)
                for group, a, b in runs
                if max(start, a) < min(stop, b)
            )
            chunks.append(Chunk(index, number, segment.rule, start, stop, pieces))
    return Layout(kept, tuple(chunks), groups)


def _runs(segment: Segment) -> list[tuple[int, int, int]]:
    """Stretches of one parameter group: (group, start, stop)."""
    runs: list[tuple[int, int, int]] = []
    offset = 0
    for entry in segment.entries:
        if not entry.size:
            continue
        if runs and runs[-1][0] == entry.group:
            runs[-1] = (entry.group, runs[-1][1], offset + entry.size)
        else:
            runs.append((entry.group, offset, offset + entry.size))
        offset += entry.size
    return runs
