"""Sums of device tensors over a transport that takes host memory only, through pinned memory.

The host never waits for the device here. The copy to the host runs on a separate stream, behind the caller's queued
work. The transport may read host memory at once, so a sum is handed over only when its copy has arrived, which is
checked whenever a worker starts a sum or waits for one. The copy back is queued on the caller's stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Copies(Protocol):
    """Copies between a device and host memory. Tests bring their own, since most machines have no GPU."""

    def needed(self, x: torch.Tensor) -> bool:
        """Return whether x must go through host memory."""

    def to_host(self, x: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
        """Start to copy x, which must live until the copy has arrived.

        Returns:
            The host tensor, and a function that tells whether it has arrived.
        """

    def to_device(self, host: torch.Tensor, x: torch.Tensor) -> None:
        """Start to copy a host tensor back to x, ahead of the caller's next use of x."""


class CudaCopies:
    """`Copies` of CUDA tensors, through pinned memory.

    PyTorch's allocator of pinned memory reuses freed buffers once the copies from and to them are done, on whichever
    stream: the number of buffers never exceeds that of sums in flight, and none is overwritten too early.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def needed(self, x: torch.Tensor) -> bool:
        return x.is_cuda

    def to_host(self, x: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        if x.device not in self._streams:
            self._streams[x.device] = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        stream = self._streams[x.device]
        stream.wait_stream(torch.cuda.current_stream(x.device))  # which is about to write x
        with torch.cuda.stream(stream):
            host.copy_(x, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(stream)
        return host, arrived.query

    def to_device(self, host: torch.Tensor, x: torch.Tensor) -> None:
        x.copy_(host, non_blocking=True)


@dataclass(eq=False)
class Sum:
    """A sum in flight; x and host are the same tensor where nothing is staged."""

    name: str
    x: torch.Tensor
    host: torch.Tensor
    arrived: Callable[[], bool] | None = None
    handle: Any = None  # the transport's, once the sum has been handed over


class Outbox:
    """A queue of sums for a transport. They leave in the order in which they came, which is the same on every worker.

    Args:
        submit: starts the sum of a tensor in host memory, in place, and returns a handle.
        copies: None where the transport takes tensors on the device itself.
    """

    def __init__(self, submit: Callable[[str, torch.Tensor], Any], copies: Copies | None) -> None:
        self._submit = submit
        self._copies = copies
        self._waiting: deque[Sum] = deque()

    def put(self, name: str, x: torch.Tensor) -> Sum:
        """Start the sum of x, which belongs to the queue until `take`."""
        if self._copies is not None and self._copies.needed(x):
            begun = Sum(name, x, *self._copies.to_host(x))
        else:
            begun = Sum(name, x, x)
        self._waiting.append(begun)
        self.advance()
        return begun

    @property
    def empty(self) -> bool:
        """True if every sum has been handed over."""
        return not self._waiting

    def advance(self) -> None:
        """Hand over the sums whose copies have arrived in host memory, in their order."""
        while self._waiting:
            first = self._waiting[0]
            if first.arrived is not None and not first.arrived():
                return
            self._waiting.popleft()
            first.handle = self._submit(first.name, first.host)

    def take(self, done: Sum) -> torch.Tensor:
        """Return the result of a sum that the transport has finished, in the memory of x."""
        if done.host is not done.x:
            assert self._copies is not None, "only copies put a sum elsewhere"
            self._copies.to_device(done.host, done.x)
        return done.x
