"""Slices dealt anew, when other workers share the vectors of which each keeps its own slice alone.

Each worker gives what it has kept so far; a sum makes the vector whole, a chunk at a time, and each cuts its new slice.
The slices of lost workers are lost: of momentum and of residuals zeros take their place, and of the anchor the mean of
the values that meet next, so that the outer step of these is a plain mean, and momentum begins there anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from hvd_slowmo.core.parts import names
from hvd_slowmo.core.parts.layout import BLOCK, Chunk
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.parts.slices import Slices

logger = logging.getLogger("hvd_slowmo")

Owner = tuple[int, int]
"""A worker's former rank, and the former number of workers."""


class FormerSlices(NamedTuple):
    """Slices that a worker kept among the former workers."""

    owner: Owner
    read: Callable[[str, int], Any]  # returns the slice of a chunk, by the vector's name and the chunk's number


class _Span(NamedTuple):
    """Elements start .. stop - 1 of a chunk, from its own start."""

    start: int
    stop: int
    giver: int | None  # rank of the worker that has them; None: they are lost


def spans(chunk: Chunk, owners: Sequence[Owner | None]) -> list[_Span]:
    """Return who has which part of a chunk, from its start to its end.

    Args:
        owners: by rank; None for those that have kept nothing.

    Example:
        >>> chunk = Chunk(0, 0, "parameter", 0, 4096)
        >>> [(each.start, each.stop, each.giver) for each in spans(chunk, [(2, 3), (0, 3), None])]
        [(0, 1024, 1), (1024, 2048, None), (2048, 4096, 0)]
    """
    edges = {0, chunk.size}
    parts = []
    for rank, owner in enumerate(owners):
        if owner is not None:
            start, stop = _bounds(chunk, owner)
            parts.append(_Span(start, stop, rank))
            edges |= {start, stop}
    cuts = sorted(edges)
    found: list[_Span] = []
    for start, stop in pairwise(cuts):
        # A loss while slices were dealt may have left two workers with one part, and with the same values.
        giver = next((part.giver for part in parts if part.start <= start and stop <= part.stop), None)
        if found and found[-1].giver == giver:
            start = found.pop().start
        found.append(_Span(start, stop, giver))
    return found


def _bounds(chunk: Chunk, owner: Owner) -> tuple[int, int]:
    first, last = Slices(chunk.size, owner[1]).span(owner[0])
    return min(first * BLOCK, chunk.size), min(last * BLOCK, chunk.size)


class Share(NamedTuple):
    """The workers' parts in the slices of a fragment, by rank."""

    owners: Sequence[Owner | None]  # None for those that have kept nothing, or nothing of use
    weights: Sequence[float]  # of their values, whose mean takes the place of an anchor that is lost; not all are 0
    vector: str = "model"  # that has this worker's values


Whole = Callable[[Chunk, Any, Sequence[_Span]], None]
"""Takes a whole chunk of an anchor that is kept in slices, and who has given which part of it."""


def deal_anew(runtime: Runtime, former: FormerSlices | None, shares: Sequence[Share], whole_anchor: Whole) -> None:
    """Give each worker its slices of the vectors that are kept in slices, by their present number. A collective.

    Nothing that was kept so far is changed.

    Args:
        former: this worker's; None: it has none.
        shares: by fragment.
        whole_anchor: called for each chunk of an anchor, which no worker keeps whole.
    """
    comm, store, slices, config = runtime.comm, runtime.store, runtime.slices, runtime.config
    store.hold([1.0] * len(runtime.layout.groups))
    lost = total = 0
    for chunk in slices.chunks:
        share = shares[chunk.fragment]
        parts = spans(chunk, share.owners)
        gone = sum(part.stop - part.start for part in parts if part.giver is None)
        lost, total = lost + gone, total + chunk.size
        gives = former if share.owners[comm.rank] is not None else None
        for vector in config.sliced_vectors:
            read = None if gives is None else _from_slice(chunk, vector, gives)
            whole = _whole(runtime, chunk, parts, comm.rank, read)
            if vector == "anchor":
                if gone:
                    whole = whole + _mean_of(runtime, chunk, parts, share)
                whole_anchor(chunk, whole, parts)
            values = runtime.codec.padded(slices.cut(chunk, whole), slices.lengths[chunk.index])
            store.write_slice(vector, chunk.index, values * 1)
    if lost and comm.rank == 0:
        logger.warning(
            "%s: the lost workers kept the slow momentum, or what rounding has withheld, of %.0f %% of the parameters: "
            "it is 0 there from now on.",
            comm.name,
            100 * lost / total,
        )


def deal_extended(runtime: Runtime, former: Runtime) -> None:
    """Give each worker its slices of chunks that parameters have been added to: elements change owners. A collective.

    Added elements get zeros, so it is for residuals, and for a momentum.

    Args:
        former: before the parameters were added; of the same workers.
    """
    comm, layout = runtime.comm, former.layout
    owners = [(rank, comm.size) for rank in range(comm.size)]
    slices = FormerSlices(owners[comm.rank], former.store.read_slice)
    for chunk in runtime.slices.chunks:
        segment = runtime.layout.segments[chunk.segment]
        places = (each for each in layout.chunks if segment.extends(layout.segments[each.segment]))
        before = next((each for each in places if each.start == chunk.start), None)
        if before is None:
            continue
        for vector in runtime.config.sliced_vectors:
            if before.size == chunk.size:
                values = slices.read(vector, before.index)
            else:
                parts = [*spans(before, owners), _Span(before.size, chunk.size, None)]
                whole = _whole(runtime, chunk, parts, comm.rank, _from_slice(before, vector, slices))
                cut = runtime.slices.cut(chunk, whole)
                values = runtime.codec.padded(cut, runtime.slices.lengths[chunk.index]) * 1
            runtime.store.write_slice(vector, chunk.index, values)


Read = Callable[[_Span], Any]
"""Returns this worker's values of a part."""


def _whole(runtime: Runtime, chunk: Chunk, parts: Sequence[_Span], giver: int | None, read: Read | None) -> Any:
    """Return the sum over the workers of a chunk of zeros, in which each sets the parts with this giver.

    Args:
        read: None: this worker gives nothing.
    """
    zeros = runtime.store.zeros(chunk) * 1
    own = [zeros[part.start : part.stop] if read is None or part.giver != giver else read(part) for part in parts]
    return runtime.comm.wait(runtime.comm.start_sum(names.values(chunk.index), runtime.ops.joined(own) * 1))


def _from_slice(chunk: Chunk, vector: str, former: FormerSlices) -> Read:
    begin, values = _bounds(chunk, former.owner)[0], former.read(vector, chunk.index)
    return lambda part: values[part.start - begin : part.stop - begin]


def _mean_of(runtime: Runtime, chunk: Chunk, parts: Sequence[_Span], share: Share) -> Any:
    """Return the mean of the workers' values where an anchor is lost, and zeros elsewhere."""
    weight = share.weights[runtime.comm.rank] / sum(share.weights)
    values = runtime.store.read(share.vector, chunk) * weight if weight else None
    return _whole(runtime, chunk, parts, None, None if values is None else lambda part: values[part.start : part.stop])
