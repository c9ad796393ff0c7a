"""The user's settings of a build."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

_PASSED_ON = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "HOROVOD_CUDA_HOME")
_PASSED_ON_PREFIXES = ("HOROVOD_BUILD_", "HOROVOD_NCCL_")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of one build; gloo is always included.

    Attributes:
        mpi: build with MPI as well.
        nccl: sum GPU tensors with NCCL.
        rebuild: build even if the cache has a wheel.
        jobs: number of files to compile at once; None: as many as processors and memory allow.

    Raises:
        ValueError: `jobs` is less than 1.
    """

    mpi: bool = False
    nccl: bool = False
    rebuild: bool = False
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(
                f"`jobs` must be a positive integer. Received: jobs={self.jobs}. Use None for the default."
            )

    def identity(self) -> dict[str, bool]:
        """Return the settings on which the content of the wheel depends."""
        return {"mpi": self.mpi, "nccl": self.nccl}


def passed_on(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables in `env` that reach the compiler and change the wheel."""
    return {
        name: value
        for name, value in sorted(env.items())
        if value and (name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES))
    }


def default_jobs() -> int:
    """Return the number of files to compile at once: one per processor, but at most one per 3 GB of memory."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return processors
    return max(1, min(processors, memory // (3 * 10**9)))
