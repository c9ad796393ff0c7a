"""Process groups of an optimizer's own."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

GLOO_AND_NCCL = "cpu:gloo,cuda:nccl"


def own_group(group: Any, host_only: bool = False) -> Any:
    """Return a new process group of the same workers. A collective of these workers.

    It always has gloo, for tensors in host memory; with NCCL in the given group, CUDA tensors go over NCCL.

    Args:
        group: the given one.
        host_only: gloo alone. NCCL's collectives of two groups must begin in one order on all workers, which threads
            do not have.
    """
    ranks = dist.get_process_group_ranks(group)
    nccl = not host_only and "nccl" in str(dist.get_backend_config(group))
    return dist.new_group(
        ranks,
        timeout=timeout_of(group),
        backend=GLOO_AND_NCCL if nccl else "gloo",
        # Names of groups that all ranks make are counted; others would wait for ranks that never come.
        use_local_synchronization=len(ranks) < dist.get_world_size(),
    )


def timeout_of(group: Any) -> timedelta:
    """Return the time after which a collective of a process group fails."""
    for device in ("cpu", "cuda"):
        try:
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):  # no such backend; one without options
            continue
        return timeout
    return dist.default_pg_timeout


class OpenGroups:
    """An optimizer's process groups, which are closed together after an error, from whatever thread.

    Args:
        first: one of them.

    Attributes:
        closing: held while they are closed.
    """

    def __init__(self, first: Any) -> None:
        self.closing = threading.Lock()
        self._open = [first]

    def add(self, group: Any) -> Any:
        """Take another group, and return it."""
        self._open.append(group)
        return group

    def close(self) -> None:
        """Close the connections: all other workers notice at once."""
        while self._open:
            dist.destroy_process_group(self._open.pop())
