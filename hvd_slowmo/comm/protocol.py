"""Comm, the protocol of collectives, and the forms of it that need no network.

Tensors are matched between workers by name. Names are constant from step to step (Horovod caches the responses to names
that it has seen), and the number and the order of collectives depend on the step count and on the results of earlier
ones only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from hvd_slowmo.comm.gathering import bounded_gather

T = TypeVar("T")

HANDSHAKE = "slowmo"
"""Prefix of the handshake's collectives, whatever an optimizer's name."""


class Comm(Protocol):
    """Collectives of the workers that train together. Tensors are the adapter's own, 1-D, of any floating type."""

    @property
    def rank(self) -> int:
        """This worker's place among those that train together, 0 .. size - 1."""

    @property
    def size(self) -> int:
        """Number of workers that train together."""

    @property
    def ranks(self) -> Sequence[int]:
        """Global ranks of these workers, which users know; they differ from 0 .. size - 1 in a process set."""

    @property
    def node(self) -> Comm | None:
        """The workers of this one's node, for gradients="node"; None where they have not been asked for."""

    def start_sum(self, name: str, x: Any) -> Any:
        """Start the sum of x over the workers; x belongs to the collective until `wait` has returned."""

    def start_push(self, name: str, x: Any, shares: Any) -> Any:
        """Start to send shares[i, rank] * x to each worker i where that share is not 0, and to receive.

        All workers call it together, with the same shares; x may be changed at once. The result is the sum of the
        tensors received, zeros if there are none.

        Args:
            shares: float64 (size, size), an entry of `hvd_slowmo.core.parts.ops.Ops.matrices`.
        """

    def start_alltoall(self, name: str, parts: Sequence[Any]) -> Any:
        """Start to send a part to each worker; the result is the list of the parts received, by rank.

        Args:
            parts: bytes (uint8, 1-D), by rank; all workers send one worker parts of one length.
        """

    def start_allgather(self, name: str, x: Any, lengths: Sequence[int]) -> Any:
        """Start to send bytes (uint8, 1-D) to all workers; the result is the list of everybody's, by rank.

        Args:
            lengths: of everybody's bytes, by rank.
        """

    def open_beside(self) -> None:
        """Prepare for `start_beside`. A collective."""

    def start_beside(self, work: Callable[[Comm], T]) -> Any:
        """Start an exchange of several collectives beside the caller; `wait` returns the result of `work`.

        Its collectives are apart from all others. Exchanges started one after another may be under way together, or
        take turns; all workers start the same ones in the same order.

        Args:
            work: the exchange, among the workers that it is given.
        """

    def wait(self, handle: Any) -> Any:
        """Return the result of a started collective; a sum's may lie in the memory of x."""

    def gather(self, name: str, item: Any) -> list[Any]:
        """Return every worker's item (picklable), by rank. For the start of a job, never within a step."""


class SoloComm:
    """One worker on its own: every sum is its operand, and nothing is sent."""

    rank = 0
    size = 1
    ranks = (0,)
    node: Comm | None = None
    family: object

    def __init__(self) -> None:
        self.family = self  # see `hvd_slowmo.comm.naming`

    def start_sum(self, name: str, x: Any) -> Any:
        return x

    def start_push(self, name: str, x: Any, shares: Any) -> Any:
        return x * 0

    def start_alltoall(self, name: str, parts: Sequence[Any]) -> Any:
        return list(parts)

    def start_allgather(self, name: str, x: Any, lengths: Sequence[int]) -> Any:
        return [x]

    def open_beside(self) -> None:
        """Do nothing: nobody else has to come."""

    def start_beside(self, work: Callable[[Comm], T]) -> T:
        return work(self)

    def wait(self, handle: Any) -> Any:
        return handle

    def gather(self, name: str, item: Any) -> list[Any]:
        return [item]


class ScopedComm:
    """Another Comm under a name: each collective's name gets the prefix "NAME.".

    Args:
        comm: the workers.
        name: of the optimizer.
        prefix: of the collectives' names; None for the optimizer's name.

    Attributes:
        name: of the optimizer, for messages.
        node: scoped too.

    Example:
        >>> ScopedComm(SoloComm(), "slowmo").gather("facts", 3)
        [3]
    """

    def __init__(self, comm: Comm, name: str, prefix: str | None = None) -> None:
        self._comm = comm
        self._prefix = name if prefix is None else prefix
        self.name = name
        self.rank, self.size, self.ranks = comm.rank, comm.size, comm.ranks
        self.node: ScopedComm | None = None if comm.node is None else ScopedComm(comm.node, name)

    @property
    def handshake(self) -> ScopedComm:
        """The same workers under a prefix that all optimizers share: their names are yet to be compared."""
        return ScopedComm(self._comm, self.name, HANDSHAKE)

    def scoped(self, name: str) -> ScopedComm:
        """Return the same workers under a longer name."""
        return ScopedComm(self._comm, f"{self.name}.{name}")

    def start_sum(self, name: str, x: Any) -> Any:
        return self._comm.start_sum(f"{self._prefix}.{name}", x)

    def start_push(self, name: str, x: Any, shares: Any) -> Any:
        return self._comm.start_push(f"{self._prefix}.{name}", x, shares)

    def start_alltoall(self, name: str, parts: Sequence[Any]) -> Any:
        return self._comm.start_alltoall(f"{self._prefix}.{name}", parts)

    def start_allgather(self, name: str, x: Any, lengths: Sequence[int]) -> Any:
        return self._comm.start_allgather(f"{self._prefix}.{name}", x, lengths)

    def open_beside(self) -> None:
        self._comm.open_beside()

    def start_beside(self, work: Callable[[ScopedComm], T]) -> Any:
        return self._comm.start_beside(lambda comm: work(ScopedComm(comm, self.name, self._prefix)))

    def wait(self, handle: Any) -> Any:
        return self._comm.wait(handle)

    def gather(self, name: str, item: Any) -> list[Any]:
        return bounded_gather(self._comm.gather, self.ranks, f"{self._prefix}.{name}", item)


class _Beside(NamedTuple):
    """An exchange beside the caller, whose bytes are counted when it is waited for."""

    handle: Any


class MeteredComm:
    """Another Comm, metered: bytes that this worker has handed over for sums, seconds that it has waited for them.

    For tensors that exist, not for a trace.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.rank, self.size, self.ranks = comm.rank, comm.size, comm.ranks
        self.node: MeteredComm | None = None if comm.node is None else MeteredComm(comm.node)
        self._bytes_sent = 0
        self._seconds_waited = 0.0
        self._seconds_exchanging = 0.0

    @property
    def bytes_sent(self) -> int:
        """Bytes handed over, to the workers of the node too."""
        return self._bytes_sent + (0 if self.node is None else self.node.bytes_sent)

    @property
    def seconds_waited(self) -> float:
        """Seconds waited, for the workers of the node too."""
        return self._seconds_waited + (0.0 if self.node is None else self.node.seconds_waited)

    @property
    def seconds_exchanging(self) -> float:
        """Seconds in which exchanges were under way, those beside the caller in full; for the node's workers too."""
        return self._seconds_exchanging + (0.0 if self.node is None else self.node.seconds_exchanging)

    def start_sum(self, name: str, x: Any) -> Any:
        self._bytes_sent += x.nbytes if self.size > 1 else 0
        return self._comm.start_sum(name, x)

    def start_push(self, name: str, x: Any, shares: Any) -> Any:
        self._bytes_sent += x.nbytes * int((shares[:, self.rank] != 0).sum())
        return self._comm.start_push(name, x, shares)

    def start_alltoall(self, name: str, parts: Sequence[Any]) -> Any:
        self._bytes_sent += sum(len(part) for rank, part in enumerate(parts) if rank != self.rank)
        return self._comm.start_alltoall(name, parts)

    def start_allgather(self, name: str, x: Any, lengths: Sequence[int]) -> Any:
        self._bytes_sent += len(x) * (self.size - 1)
        return self._comm.start_allgather(name, x, lengths)

    def open_beside(self) -> None:
        self._comm.open_beside()

    def start_beside(self, work: Callable[[Comm], T]) -> _Beside:
        def measured(comm: Comm) -> tuple[T, int, float]:
            own, started = MeteredComm(comm), time.perf_counter()
            return work(own), own.bytes_sent, time.perf_counter() - started

        return _Beside(self._comm.start_beside(measured))

    def wait(self, handle: Any) -> Any:
        started = time.perf_counter()
        if isinstance(handle, _Beside):
            result, sent, seconds = self._comm.wait(handle.handle)
            self._bytes_sent += sent
        else:
            result, seconds = self._comm.wait(handle), 0.0
        waited = time.perf_counter() - started
        self._seconds_waited += waited
        self._seconds_exchanging += seconds or waited
        return result

    def gather(self, name: str, item: Any) -> list[Any]:
        return self._comm.gather(name, item)
