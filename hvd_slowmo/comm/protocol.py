"""Comm, the protocol of collectives, and two forms of it that need no network.

Tensors are matched between workers by name. Names are constant from step to step (Horovod caches what it has seen),
and how many collectives there are, in which order, depends on the step count and on the results of earlier ones only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Comm(Protocol):
    """What the state machine needs of a network. Tensors are the adapter's own, 1-D, of any floating type."""

    @property
    def rank(self) -> int:
        """This worker's place among those that train together, 0 .. size - 1."""

    @property
    def size(self) -> int:
        """How many workers train together."""

    @property
    def ranks(self) -> Sequence[int]:
        """What users call these workers: their global ranks, which differ from 0 .. size - 1 in a process set."""

    def start_sum(self, name: str, x: Any) -> Any:
        """Begin the sum of x over the workers; x belongs to the collective until `wait` has returned."""

    def start_push(self, name: str, x: Any, weights: Any) -> Any:
        """Begin to send weights[i] * x to each worker i whose weight is not 0, and to receive.

        All workers call it together; x may be changed at once. weights: float64 (size,). The result is the sum of what
        has come, zeros if nothing has.
        """

    def wait(self, handle: Any) -> Any:
        """The result of what was started; a sum's may lie in the memory of x."""

    def gather(self, name: str, item: Any) -> list[Any]:
        """Every worker's item (picklable), by rank. For the start of a training, never within a step."""


class SoloComm:
    """One worker on its own: every sum is what it was, nothing is sent."""

    rank = 0
    size = 1
    ranks = (0,)

    def start_sum(self, name: str, x: Any) -> Any:
        return x

    def start_push(self, name: str, x: Any, weights: Any) -> Any:
        return x * 0

    def wait(self, handle: Any) -> Any:
        return handle

    def gather(self, name: str, item: Any) -> list[Any]:
        return [item]


class MeteredComm:
    """Another Comm, counted: bytes that this worker has handed over for sums, seconds that it has waited for them.

    For tensors that exist, not for a trace.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.rank, self.size, self.ranks = comm.rank, comm.size, comm.ranks
        self.bytes_sent = 0
        self.seconds_waited = 0.0

    def start_sum(self, name: str, x: Any) -> Any:
        self.bytes_sent += x.nbytes if self.size > 1 else 0
        return self._comm.start_sum(name, x)

    def start_push(self, name: str, x: Any, weights: Any) -> Any:
        self.bytes_sent += x.nbytes * int((weights != 0).sum())
        return self._comm.start_push(name, x, weights)

    def wait(self, handle: Any) -> Any:
        started = time.perf_counter()
        result = self._comm.wait(handle)
        self.seconds_waited += time.perf_counter() - started
        return result

    def gather(self, name: str, item: Any) -> list[Any]:
        return self._comm.gather(name, item)
