"""What the user chooses about a build."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

_PASSED_ON = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "HOROVOD_CUDA_HOME")
_PASSED_ON_PREFIXES = ("HOROVOD_BUILD_", "HOROVOD_NCCL_")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of one build; gloo is always built.

    Attributes:
        mpi: build MPI in as well.
        nccl: sum GPU tensors with NCCL.
        rebuild: build even if the cache has a wheel.
        jobs: compile so many files at once; None: as many as processors and memory allow.
    """

    mpi: bool = False
    nccl: bool = False
    rebuild: bool = False
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"`jobs` must be a positive integer. Received: jobs={self.jobs}")

    def identity(self) -> dict[str, bool]:
        """The settings that change what is built."""
        return {"mpi": self.mpi, "nccl": self.nccl}


def passed_on(env: Mapping[str, str]) -> dict[str, str]:
    """Return those variables of the user's environment that reach the compiler and change what is built."""
    return {
        name: value
        for name, value in sorted(env.items())
        if value and (name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES))
    }


def default_jobs() -> int:
    """Return how many files to compile at once: one per processor, and not more than one per 3 GB of memory."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return processors
    return max(1, min(processors, memory // (3 * 10**9)))
