"""The launcher that has started this process, and the number of workers that it says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal, NamedTuple

IGNORE = "HVD_SLOWMO_IGNORE_LAUNCHER"
"""Environment variable: 1 if processes that a launcher has started together are meant to train apart."""

# Slurm's numbers of the steps in which a batch script and an interactive shell run; srun counts from 0.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


class Launch(NamedTuple):
    """A launcher and its number of workers.

    Attributes:
        launcher: its name, for messages.
        workers: 1 without a launcher.
        transport: the one that can find the other workers, "horovod" or "torch".
    """

    launcher: str
    workers: int
    transport: Literal["horovod", "torch"]


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return the launcher that says the most workers; among several, torchrun, which others may start once per node.

    horovodrun decides alone where it has started this process: other variables are those of the shell in which it runs.
    SLURM_NTASKS is not looked at, because it describes an allocation, and also stands where a batch script calls a
    single process.

    Example:
        >>> launched({"WORLD_SIZE": "4", "RANK": "0"})
        Launch(launcher='torchrun or a launcher like it', workers=4, transport='torch')
    """

    def count(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isascii() and value.isdecimal() else 1

    nothing = Launch("no launcher", 1, "horovod")
    if environment.get(IGNORE, "") not in ("", "0"):
        return nothing
    if "HOROVOD_SIZE" in environment:
        return Launch("horovodrun", count("HOROVOD_SIZE"), "horovod")
    in_srun = "SLURM_STEP_ID" in environment and count("SLURM_STEP_ID") < _FIRST_SPECIAL_STEP
    found = [
        nothing,
        Launch("torchrun or a launcher like it", count("WORLD_SIZE"), "torch"),
        Launch("mpirun", count("OMPI_COMM_WORLD_SIZE"), "horovod"),
        Launch("mpirun or srun", count("PMI_SIZE"), "horovod"),
        Launch("srun", count("SLURM_STEP_NUM_TASKS") if in_srun else 1, "horovod"),
    ]
    return max(found, key=lambda launch: launch.workers)


def elastic(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether Horovod's elastic launcher has started this process: workers come and go.

    Example:
        >>> elastic({"HOROVOD_ELASTIC": "1"}), elastic({})
        (True, False)
    """
    return environment.get("HOROVOD_ELASTIC", "0") not in ("", "0")


def alone_text(launch: Launch, size: int, library: str = "Horovod") -> str:
    """Return the text of an error: the launcher says more workers than a library has."""
    return (
        f"{launch.launcher} has started {launch.workers} workers, and {library} has {size}: each would train without "
        f"the others. Start them with: horovodrun -np {launch.workers} python train.py (or with mpirun, if Horovod was "
        f"built with MPI), or for PyTorch alone: torchrun --nproc-per-node {launch.workers} train.py. If they are "
        f"meant to train apart, set {IGNORE}=1."
    )
