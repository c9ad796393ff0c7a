"""The core's scalars beside PyTorch's tensors, and work of another thread on CUDA streams of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar, cast

import torch

from hvd_slowmo.core.parts.ops import EagerOps

C = TypeVar("C")
T = TypeVar("T")


class _Elsewhere(NamedTuple):
    """The result of another thread, and events behind the kernels that it has queued."""

    result: Any
    queued: list[torch.cuda.Event]


class TorchOps(EagerOps):
    """`hvd_slowmo.core.parts.ops.Ops` beside PyTorch's tensors.

    Args:
        devices: of the tensors.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        super().__init__(torch.from_numpy, torch.Tensor.numpy, lambda parts: torch.cat(list(parts)))
        self._devices = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
        self._streams: list[torch.cuda.Stream] = []

    def detached(self, work: Callable[[C], T]) -> Callable[[C], T]:
        # Behind the caller's kernels, which write what the work reads.
        before = [torch.cuda.current_stream(device).record_event() for device in self._devices]
        if len(self._streams) < len(self._devices):
            self._streams = [torch.cuda.Stream(device) for device in self._devices]  # type: ignore[no-untyped-call]

        def elsewhere(given: C) -> T:
            with torch.no_grad(), ExitStack() as stack:
                for stream, event in zip(self._streams, before, strict=True):
                    stack.enter_context(torch.cuda.stream(stream))
                    stream.wait_event(event)
                result = work(given)
                return cast(T, _Elsewhere(result, [stream.record_event() for stream in self._streams]))

        return elsewhere

    def attached(self, result: T) -> T:
        found, queued = cast(_Elsewhere, result)
        for device, event in zip(self._devices, queued, strict=True):
            torch.cuda.current_stream(device).wait_event(event)
        for tensor in _tensors(found) if self._devices else ():
            if tensor.is_cuda:  # its memory is of the other stream, which must not use it again too early
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return cast(T, found)


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for part in found:
            yield from _tensors(part)
