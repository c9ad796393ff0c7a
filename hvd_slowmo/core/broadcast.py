"""One worker's vectors for all, and plain means outside of a meeting: sums that need no ledger."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core import names
from hvd_slowmo.core.progress import Scalar
from hvd_slowmo.core.runtime import Runtime
from hvd_slowmo.wire.tensors import Role


def take_from(
    runtime: Runtime, source: Scalar, roles: Sequence[Role] = ("parameter",), comm: ScopedComm | None = None
) -> None:
    """Give everybody one worker's values of the segments with these roles, bitwise identical. A collective.

    A broadcast is a sum to which all others contribute zeros.

    Args:
        source: the worker's rank in `comm`.
        comm: the workers; None for all.
    """
    workers, store = comm or runtime.comm, runtime.store
    store.hold([1.0] * len(runtime.layout.groups))  # frozen parameters are given too
    for chunk in runtime.layout.chunks:
        if chunk.role in roles:
            values = runtime.ops.cond(
                source == workers.rank,
                partial(store.read, "model", chunk),
                partial(store.zeros, chunk),
            )
            store.write("model", chunk, workers.wait(workers.start_sum(names.model(chunk.index), values)))


def average_statistics(runtime: Runtime) -> None:
    """Set the model's statistics to the workers' plain mean. A collective."""
    comm, store = runtime.comm, runtime.store
    for chunk in runtime.layout.chunks:
        if chunk.role == "statistic":
            total = comm.wait(comm.start_sum(names.model(chunk.index), store.read("model", chunk)))
            store.write("model", chunk, total / comm.size)
