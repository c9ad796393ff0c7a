"""Sums of tensors on a device over a Horovod that takes host memory only: they go through pinned memory.

The host never waits for the device here. The copy to the host runs on a stream of its own, behind what the caller has
queued; Horovod may read host memory as soon as it is told of it, so a sum is handed over once its copy is there, which
is looked at whenever a worker starts a sum or waits for one. The copy back is queued on the caller's stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Copies(Protocol):
    """The ways between a device and host memory. Tests have ways of their own, since most machines have no GPU."""

    def needed(self, x: torch.Tensor) -> bool:
        """Return whether x must go through host memory."""

    def to_host(self, x: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
        """Begin to copy x: where in host memory, and what tells whether it is there. x must live until it is."""

    def to_device(self, host: torch.Tensor, x: torch.Tensor) -> None:
        """Begin to copy what came to host memory back to x, before whatever the caller does with x next."""


class CudaCopies:
    """`Copies` of CUDA tensors, through pinned memory.

    PyTorch's allocator of pinned memory keeps what is freed and gives it out again once the copies from and to it are
    done, on whichever stream: there are never more buffers than sums under way, and none is overwritten too early.
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
    """One sum under way; x and host are the same tensor where nothing is staged."""

    name: str
    x: torch.Tensor
    host: torch.Tensor
    arrived: Callable[[], bool] | None = None
    handle: Any = None  # Horovod's, once the sum has been handed over


class Outbox:
    """Sums on their way to Horovod.

    Args:
        submit: begins the sum of a tensor in host memory, in place; returns a handle.
        copies: None where Horovod takes tensors on the device itself.
    """

    def __init__(self, submit: Callable[[str, torch.Tensor], Any], copies: Copies | None) -> None:
        self._submit = submit
        self._copies = copies
        self._waiting: deque[Sum] = deque()

    def put(self, name: str, x: torch.Tensor) -> Sum:
        """Begin the sum of x, which belongs to it until `take`."""
        if self._copies is None or not self._copies.needed(x):
            return Sum(name, x, x, handle=self._submit(name, x))
        begun = Sum(name, x, *self._copies.to_host(x))
        self._waiting.append(begun)
        self.advance()
        return begun

    def advance(self) -> None:
        """Hand over what has arrived in host memory, in the order in which it was put."""
        while self._waiting:
            first = self._waiting[0]
            if first.arrived is not None and not first.arrived():
                return
            self._waiting.popleft()
            first.handle = self._submit(first.name, first.host)

    def take(self, done: Sum) -> torch.Tensor:
        """The result of a sum that Horovod has finished, in the memory of x."""
        if done.host is not done.x:
            assert self._copies is not None, "only copies put a sum elsewhere"
            self._copies.to_device(done.host, done.x)
        return done.x
