"""Slices of the chunks, one per worker, of vectors of which each worker keeps or works on its own slice alone."""

from __future__ import annotations

from typing import NamedTuple

from hvd_slowmo.core.layout import Chunk, Layout

BLOCK = 1024
"""Values of a slice that belong together: those that share a scale in few bits."""


class Slices(NamedTuple):
    """The slices of a vector, one per worker: whole blocks, so that any slice can be decoded alone."""

    length: int  # elements of the vector
    workers: int

    @property
    def blocks(self) -> int:
        """Number of blocks, the last of which may be filled up with zeros."""
        return -(-self.length // BLOCK)

    def span(self, worker: int) -> tuple[int, int]:
        """Return the first block of a worker's slice and the one behind its last."""
        return self.blocks * worker // self.workers, self.blocks * (worker + 1) // self.workers

    def elements(self, worker: int) -> int:
        """Return the number of elements of a worker's slice, filled up to whole blocks."""
        first, last = self.span(worker)
        return (last - first) * BLOCK


def lengths(layout: Layout, rank: int, size: int) -> dict[int, int]:
    """Return the length of a worker's slice, filled up to whole blocks, for each chunk that travels in slices.

    Args:
        rank, size: of the worker, and number of workers.
    """
    return {chunk.index: Slices(chunk.size, size).elements(rank) for chunk in sliced_chunks(layout)}


def sliced_chunks(layout: Layout) -> list[Chunk]:
    """Return the chunks that travel in slices."""
    return [chunk for chunk in layout.chunks if layout.segments[chunk.segment].coded]
