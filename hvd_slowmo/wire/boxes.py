"""Stretches of a flattened tensor as boxes of the tensor, which can be read and assigned in place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Box = tuple[slice, ...]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """Yield elements start .. stop - 1 of a row-major tensor, in their order, as boxes: (index, number of elements).

    At most two per dimension beside the largest: the end of a row, whole rows, the beginning of another.

    Example:
        >>> list(boxes((3, 4), 2, 8))
        [((slice(0, 1, None), slice(2, 4, None)), 2), ((slice(1, 2, None),), 4)]
    """
    if start == stop:
        return
    if not shape:
        yield (), 1
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows lie between
    if first > last:  # within one row
        yield from _within_row(shape, last, start, stop)
        return
    yield from _within_row(shape, first - 1, start, first * row)
    if first < last:
        yield (slice(first, last),), (last - first) * row
    yield from _within_row(shape, last, last * row, stop)


def _within_row(shape: Sequence[int], number: int, start: int, stop: int) -> Iterator[tuple[Box, int]]:
    row = math.prod(shape[1:])
    for box, count in boxes(shape[1:], start - number * row, stop - number * row):
        yield (slice(number, number + 1), *box), count
