"""Slices of the chunks, one per worker, of vectors of which each worker keeps or works on its own slice alone."""

from __future__ import annotations

from typing import Any, NamedTuple

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.layout import BLOCK, Chunk, Layout
from hvd_slowmo.wire.tensors import TensorSpec


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


def travels_in_slices(config: SlowMoConfig, spec: TensorSpec) -> bool:
    """Return whether a parameter travels in slices: in few bits, or because the outer state is divided.

    In few bits matrices alone do: biases and norms are short, and sensitive.

    Example:
        >>> from hvd_slowmo.wire.views import View
        >>> bias = TensorSpec("bias", "parameter", (3,), "float32", View.same((3,)), "bias")
        >>> travels_in_slices(SlowMoConfig(bits=8), bias), travels_in_slices(SlowMoConfig(shard=True), bias)
        (False, True)
    """
    if config.tau is not None and config.bits < 32:
        return spec.wire_dtype == "float32" and len(spec.shape) > 1
    return config.shards


class OwnSlices:
    """This worker's slices of a layout's chunks.

    Args:
        config: the settings.
        layout: of the model.
        rank, size: of the worker, and number of workers.

    Attributes:
        rank, size: as given.
        chunks: those that travel in slices.
        lengths: of this worker's slice of each, filled up to whole blocks, by the chunk's number.
    """

    def __init__(self, config: SlowMoConfig, layout: Layout, rank: int, size: int) -> None:
        self._names = config.sliced_vectors
        self.rank, self.size = rank, size
        self.chunks = [chunk for chunk in layout.chunks if layout.segments[chunk.segment].sliced]
        self.lengths = {chunk.index: Slices(chunk.size, size).elements(rank) for chunk in self.chunks}

    def keeps(self, vector: str, chunk: int) -> bool:
        """Return whether of this chunk of a vector the worker keeps its slice alone."""
        return vector in self._names and chunk in self.lengths

    def part(self, chunk: Chunk) -> Chunk | None:
        """Return the elements of a chunk in this worker's slice; None if there are none."""
        first, last = Slices(chunk.size, self.size).span(self.rank)
        start, stop = chunk.start + first * BLOCK, min(chunk.start + last * BLOCK, chunk.stop)
        return chunk.part(start, stop) if start < stop else None

    def cut(self, chunk: Chunk, whole: Any) -> Any:
        """Return the elements of a whole chunk in this worker's slice, not filled up."""
        part = self.part(chunk)
        return whole[:0] if part is None else whole[part.start - chunk.start : part.stop - chunk.start]

    def allocations(self) -> dict[str, dict[int, int]]:
        """Return the length of each slice that is kept, by vector and chunk."""
        return dict.fromkeys(self._names, self.lengths)
