"""`hvd_slowmo_torch.comm.host_staging.Copies` without a device, to test host staging on any machine."""

from __future__ import annotations

from collections.abc import Callable

import torch


class LateCopies:
    """Treats tensors of one type as being on a device; a copy to the host completes after some polls."""

    def __init__(self, looks: int, dtype: torch.dtype) -> None:
        self.looks = looks
        self.dtype = dtype

    def needed(self, x: torch.Tensor) -> bool:
        return x.dtype == self.dtype

    def to_host(self, x: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
        host = torch.full_like(x, torch.nan)  # exposes reads before the copy has arrived
        left = self.looks

        def arrived() -> bool:
            nonlocal left
            left -= 1
            if left < 0:
                host.copy_(x)
            return left < 0

        return host, arrived

    def to_device(self, host: torch.Tensor, x: torch.Tensor) -> None:
        x.copy_(host)
