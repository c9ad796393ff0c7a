"""One worker's vectors for all, and plain means outside of a meeting: sums that need no ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core.parts import names
from hvd_slowmo.core.parts.layout import Chunk
from hvd_slowmo.core.parts.progress import Scalar
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.wire.tensors import Role


def take_from(
    runtime: Runtime, source: Scalar, roles: Sequence[Role] = ("parameter",), comm: ScopedComm | None = None
) -> None:
    """Give everybody one worker's values of the segments with these roles, bitwise identical. A collective.

    Args:
        source: the worker's rank in `comm`.
        comm: the workers; None for all.
    """
    take_chunks(runtime, source, [chunk for chunk in runtime.layout.chunks if chunk.role in roles], comm=comm)


def take_chunks(
    runtime: Runtime,
    source: Scalar,
    chunks: Sequence[Chunk],
    vector: str = "model",
    takes: bool = True,
    comm: ScopedComm | None = None,
) -> None:
    """Give one worker's values of these chunks to all that take them, bitwise identical. A collective.

    Args:
        source, vector, comm: as in `values_of`.
        takes: this worker writes what comes.
    """
    for chunk, values in values_of(runtime, source, chunks, vector, comm):
        if takes:
            runtime.store.write(vector, chunk, values)


def values_of(
    runtime: Runtime,
    source: Scalar,
    chunks: Sequence[Chunk],
    vector: str = "model",
    comm: ScopedComm | None = None,
) -> Iterator[tuple[Chunk, Any]]:
    """Yield one worker's values of these chunks, bitwise identical on all workers. A collective.

    A broadcast is a sum to which all others contribute zeros. Values must be used, or copied, before the next ones.

    Args:
        source: the worker's rank in `comm`.
        vector: name of the one of which it gives chunks.
        comm: the workers; None for all.
    """
    workers, store, ops = comm or runtime.comm, runtime.store, runtime.ops
    store.hold([1.0] * len(runtime.layout.groups))  # frozen parameters are given too

    def start(chunk: Chunk) -> Any:
        read = partial(store.read, "model", chunk) if vector == "model" else lambda: store.read(vector, chunk) * 1
        values = ops.cond(source == workers.rank, read, partial(store.zeros, chunk))
        return workers.start_sum(names.values(chunk.index), values)

    total = None
    for chunk in chunks:
        # One after the other: a trace would read all chunks at once, and hold the model a second time.
        handle = start(chunk) if total is None else ops.after(total[0], partial(start, chunk))
        total = workers.wait(handle)
        yield chunk, total


def average_chunks(runtime: Runtime, chunks: Sequence[Chunk], counts: Sequence[bool] | None = None) -> None:
    """Set chunks of the model to the workers' plain mean, on all of them, bitwise identical. A collective.

    Args:
        counts: by rank, whether the worker's values count; None: all do.
    """
    comm, store = runtime.comm, runtime.store
    counted = comm.size if counts is None else sum(counts)
    store.hold([1.0] * len(runtime.layout.groups))  # frozen parameters too
    for chunk in chunks:
        own = store.read("model", chunk) if counts is None or counts[comm.rank] else store.zeros(chunk)
        total = comm.wait(comm.start_sum(names.values(chunk.index), own))
        store.write("model", chunk, total / runtime.ops.cast_like(counted, total))
