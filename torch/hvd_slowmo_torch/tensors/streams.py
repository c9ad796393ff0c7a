"""The CUDA device and streams of a thread, for another one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch


def caller_context(devices: Iterable[torch.device]) -> AbstractContextManager[None]:
    """Return a context, to be entered in another thread, with this thread's CUDA device and current streams.

    PyTorch starts each thread on device 0 and its default stream: collectives there would neither wait for the kernels
    of the caller's stream nor be waited for.

    Args:
        devices: of the tensors that are used there; those without CUDA need nothing.
    """
    used = {device for device in devices if device.type == "cuda"}
    streams = [torch.cuda.current_stream(device) for device in used]
    own = torch.cuda.current_device() if used else None

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))  # selects the stream's device too
            if own is not None:
                stack.enter_context(torch.cuda.device(own))
            yield

    return entered()
