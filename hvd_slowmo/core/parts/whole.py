"""Whole vectors of the slices that the workers keep, for checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.codec import payload_bytes, plain
from hvd_slowmo.core.parts.layout import BLOCK, ITEMSIZE, Chunk
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.parts.slices import Slices

Whole = dict[str, dict[int, NDArray[Any]]]
"""Whole chunks in host memory, by vector and number."""


def divided_vectors(config: SlowMoConfig) -> list[str]:
    """Return the names of the vectors of the outer step that are kept in slices.

    Example:
        >>> divided_vectors(SlowMoConfig(shard=True)), divided_vectors(SlowMoConfig(shard=True, bits=8))
        (['anchor', 'v'], ['v'])
    """
    return [name for name in config.vectors if name in config.sliced_vectors]


def gather_whole(runtime: Runtime, to_host: Callable[[Any], NDArray[Any]]) -> Whole:
    """Return all whole chunks of vectors that are kept in slices. A collective, empty where none are.

    Args:
        to_host: copies a tensor to host memory; a device need not hold more than a chunk.
    """
    return {
        name: {chunk.index: to_host(_gather(runtime, name, chunk)) for chunk in runtime.slices.chunks}
        for name in divided_vectors(runtime.config)
    }


def _gather(runtime: Runtime, name: str, chunk: Chunk) -> Any:
    # Names of its own: an exchange in flight has those of the chunks' means.
    comm, codec, slices = runtime.comm.scoped("save"), runtime.codec, Slices(chunk.size, runtime.comm.size)
    bits = 8 * ITEMSIZE[runtime.layout.segments[chunk.segment].dtype]
    elements = [slices.elements(rank) for rank in range(comm.size)]
    own = codec.encode(plain(runtime.store.read_slice(name, chunk.index)), 0, elements[comm.rank] // BLOCK, bits)
    handle = comm.start_allgather(f"{name}.{chunk.index}", own, [payload_bytes(n, bits) for n in elements])
    return codec.decode(codec.cut_all(comm.wait(handle), bits), bits)[: chunk.size]
