"""Finding the other workers through Horovod, the same way for every framework, and what to say when they are lost."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable
from typing import Any

from hvd_slowmo.comm.protocol import Comm, SoloComm
from hvd_slowmo.comm.rendezvous import hosts_by_rendezvous

# What launchers tell a worker about the number of its fellows: horovodrun with gloo, Open MPI, MPICH and Slurm's PMI.
_WORLD_SIZES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class Workers:
    """One framework's side of Horovod.

    Args:
        module: Horovod's module for it, "horovod.torch" or "horovod.tensorflow".
        framework: its name, for messages.
        door: the user's import, for messages.
        comm: makes a `Comm` of a Horovod process set.
    """

    def __init__(self, module: str, framework: str, door: str, comm: Callable[[Any], Comm]) -> None:
        self._module = module
        self._framework = framework
        self._door = door
        self._comm = comm
        # What init() has registered: the ranks of each node, and Horovod's process sets of those with several workers.
        self._nodes: list[list[int]] = []
        self._sets: list[Any] = []

    def connect(self, process_set: Any = None) -> Comm:
        """The workers to train with: Horovod's, those of a process set, or this process alone.

        Raises:
            ValueError: a launcher started several workers and `hvd.init()` was not called, or this worker is not a
                member of the process set.
            ImportError: several workers or a process set, and Horovod is not installed for this framework.
        """
        launched = max((int(os.environ.get(key) or 1) for key in _WORLD_SIZES), default=1)
        try:
            hvd = importlib.import_module(self._module)
        except ImportError as error:
            if launched > 1 or process_set is not None:
                raise ImportError(
                    f"several workers need Horovod with {self._framework} support, and it cannot be imported "
                    f"({error}). Run: hvd-slowmo install-horovod"
                ) from error
            return SoloComm()
        if not hvd.is_initialized():
            if launched > 1 or process_set is not None:
                raise ValueError(
                    f"Horovod has not been initialized, and this is one of {launched} workers. Call hvd.init() first."
                )
            return SoloComm()
        members = hvd.global_process_set if process_set is None else process_set
        if not members.included():
            raise ValueError(
                f"rank {hvd.rank()} is not in the process set with ranks {members.ranks}. "
                "Construct SlowMo on the set's own ranks only."
            )
        return SoloComm() if members.size() == 1 else self._comm(members)

    def init(self) -> None:
        """`hvd.init()`, with the workers of each node registered as a process set, for gradients="node".

        Static process sets, which Horovod takes at its start only: dynamic ones slow every collective down. Where the
        workers can't learn before that who is where, Horovod is started once for it, and once more with the sets.

        Raises:
            ImportError: Horovod is not installed for this framework.
            TimeoutError: a worker has not come.
        """
        hvd = importlib.import_module(self._module)
        # horovodrun's name for the host: "nodes" may be several names of one machine.
        host = os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname()
        hosts = None if hvd.is_initialized() else hosts_by_rendezvous(host)
        if hosts is None:
            hvd.init()
            comm = SoloComm() if hvd.size() == 1 else self._comm(hvd.global_process_set)
            hosts = comm.gather("slowmo.hosts", host)
            hvd.shutdown()
        nodes = [[rank for rank, other in enumerate(hosts) if other == each] for each in dict.fromkeys(hosts)]
        # One worker needs no set, and all of them are the global one.
        self._sets = [hvd.ProcessSet(ranks) for ranks in nodes if 1 < len(ranks) < len(hosts)]
        self._nodes = nodes
        hvd.init(process_sets=list(self._sets))

    def connect_node(self) -> Comm:
        """The workers of this node, this one included.

        Raises:
            ValueError: Horovod was not started by `init()`.
        """
        if not self._nodes:
            raise ValueError(
                f"gradients='node' needs a process set per node. Call {self._door}.init() in place of hvd.init()."
            )
        hvd = importlib.import_module(self._module)
        ranks = next(ranks for ranks in self._nodes if hvd.rank() in ranks)
        if len(ranks) == 1:
            return SoloComm()
        return self._comm(next((s for s in self._sets if s.included()), hvd.global_process_set))


class Link:
    """Whether collectives still work. After Horovod's error nothing more may be submitted.

    A collective submitted right after that error can freeze the process, even while it ends (docs/architecture.md).
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._broken: str | None = None

    def refuse_if_broken(self) -> None:
        """Raise RuntimeError after `explain` has seen a worker lost."""
        if self._broken is not None:
            raise RuntimeError(
                f"nothing more can be exchanged after Horovod's error ({self._broken}). End this process; the job can "
                "be resumed from its last checkpoint."
            )

    def explain(self, error: Exception) -> Exception:
        """What to raise in place of an error of a collective."""
        if "Mismatched" in str(error):
            return ValueError(f"the workers do not exchange the same: {error}")
        from horovod.common.exceptions import HorovodInternalError

        self._broken = str(error)
        lost: Exception = HorovodInternalError(
            f"rank {self._rank}: a collective failed, most likely because another worker ended or was killed; look at "
            f"that worker's output. Horovod says: {error}"
        )
        return lost
