"""Finding the other workers through Horovod, the same way for every framework, and explaining their loss."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from hvd_slowmo.comm.absence import absent_ranks
from hvd_slowmo.comm.autotune import warn_of_autotuning
from hvd_slowmo.comm.failure import FailureLatch, absence
from hvd_slowmo.comm.launcher import alone_text, elastic, launched
from hvd_slowmo.comm.naming import family
from hvd_slowmo.comm.protocol import Comm, SoloComm
from hvd_slowmo.comm.rendezvous import RendezvousBoard, hosts_by_rendezvous
from hvd_slowmo.comm.time_limit import VARIABLE, horovods_limit, limit_horovod, time_limit

MakeComm = Callable[[Any, Comm | None], Comm]
"""Makes a `Comm` of a Horovod process set and of the node's workers."""


class Workers:
    """One framework's side of Horovod.

    Args:
        module: Horovod's module for it, "horovod.torch" or "horovod.tensorflow".
        framework: its name, for messages.
        door: the user's import, for messages.
        make: makes a `Comm`.
    """

    def __init__(self, module: str, framework: str, door: str, make: MakeComm) -> None:
        self._module = module
        self._framework = framework
        self._door = door
        self._make = make
        # Registered by init(): the ranks of each node, and Horovod's process sets of those with several workers.
        self._nodes: list[list[int]] = []
        self._sets: list[Any] = []

    def connect(self, process_set: Any = None, node: bool = False) -> Comm:
        """Return the workers to train with: Horovod's, those of a process set, or this process alone.

        Args:
            node: connect the workers of this one's node too, for gradients="node".

        Raises:
            ValueError: a launcher started more workers than Horovod has, or several and `hvd.init()` was not called;
                this worker is not a member of the process set; or `node` is given without `init()` of the door, or with
                a process set.
            ImportError: several workers or a process set, and Horovod is not installed for this framework.
        """
        if node and process_set is not None:
            raise ValueError("gradients='node' works on all ranks only: give no process_set.")
        launch = launched()
        try:
            hvd = importlib.import_module(self._module)
        except ImportError as error:
            if launch.workers > 1 or process_set is not None:
                raise ImportError(
                    f"several workers need Horovod with {self._framework} support, and it cannot be imported "
                    f"({error}). Run: hvd-slowmo install-horovod"
                ) from error
            return self._alone(node)
        if not hvd.is_initialized():
            if launch.workers > 1 and launch.transport != "horovod":
                raise ValueError(alone_text(launch, 1))
            if launch.workers > 1 or process_set is not None:
                raise ValueError(
                    f"Horovod has not been initialized, and this is one of {launch.workers} workers. Call "
                    f"{self._door}.init() or hvd.init() first."
                )
            return self._alone(node)
        if launch.workers > hvd.size() and not elastic():  # the variables say how many there were at the start
            raise ValueError(alone_text(launch, hvd.size()))
        members = hvd.global_process_set if process_set is None else process_set
        if not members.included():
            raise ValueError(
                f"rank {hvd.rank()} is not in the process set with ranks {members.ranks}. "
                "Construct SlowMo on the set's own ranks only."
            )
        if members.size() == 1:
            return self._alone(node)
        warn_of_autotuning(hvd.rank())
        return self._make(members, self._connect_node() if node else None)

    def init(self, timeout: float | None = None) -> None:
        """Call `hvd.init()`, with the workers of each node registered as a process set, for gradients="node".

        Static process sets, which Horovod takes at its start only: dynamic ones slow every collective down. Where the
        workers can't learn before that who is on which host, Horovod is started once for it, and once more with the
        sets.

        Args:
            timeout: seconds that the others wait in an exchange for a worker that does not come, before all of them
                fail; longer than anything that one worker does alone, such as an evaluation. None for
                HVD_SLOWMO_TIMEOUT from the environment, or else 300 in an elastic job and no limit in others.

        Raises:
            TypeError, ValueError: `timeout` is no number of at least one second, or comes after `hvd.init()`.
            ImportError: Horovod is not installed for this framework.
            TimeoutError: a worker has not come.
        """
        limit = time_limit(timeout)
        hvd = importlib.import_module(self._module)
        if timeout is not None and hvd.is_initialized():
            raise ValueError(
                f"Horovod reads its limits when it is initialized: call {self._door}.init(timeout=...) in place of "
                f"hvd.init(), or set {VARIABLE} for the job."
            )
        if limit is not None:
            limit_horovod(limit)
        if elastic():  # workers that train already can't take part in more than Horovod's own start
            hvd.init()
            return
        # horovodrun's name for the host: "nodes" may be several names of one machine.
        host = os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname()
        hosts = None if hvd.is_initialized() else hosts_by_rendezvous(host)
        if hosts is None:
            hvd.init()
            comm = SoloComm() if hvd.size() == 1 else self._make(hvd.global_process_set, None)
            hosts = comm.gather("slowmo.hosts", host)
            hvd.shutdown()
        nodes = [[rank for rank, other in enumerate(hosts) if other == each] for each in dict.fromkeys(hosts)]
        # One worker needs no set, and all of them are the global one.
        self._sets = [hvd.ProcessSet(ranks) for ranks in nodes if 1 < len(ranks) < len(hosts)]
        self._nodes = nodes
        hvd.init(process_sets=list(self._sets))

    def _alone(self, node: bool) -> Comm:
        comm = SoloComm()
        comm.node = SoloComm() if node else None
        if elastic():  # others may come, among whom optimizers have the names that they would have had
            comm.family = family("horovod", (0,))
        return comm

    def _connect_node(self) -> Comm:
        if not self._nodes:
            raise ValueError(
                f"gradients='node' needs a process set per node. Call {self._door}.init() in place of hvd.init()."
            )
        hvd = importlib.import_module(self._module)
        ranks = next(ranks for ranks in self._nodes if hvd.rank() in ranks)
        if len(ranks) == 1:
            return SoloComm()
        return self._make(next((s for s in self._sets if s.included()), hvd.global_process_set), None)


class HorovodFailures(FailureLatch):
    """Horovod's errors.

    Args:
        rank: of this worker, for messages.
        ranks: of all workers that fail together.
    """

    def __init__(self, rank: int, ranks: Sequence[int] = ()) -> None:
        super().__init__("Horovod", rank, _internal_error)
        self._ranks = ranks

    def explain(self, error: Exception, name: str | None = None) -> Exception:
        """Return the exception to raise in place of an error of a collective.

        Args:
            name: of the collective, where it is known.
        """
        if "Mismatched" in str(error):
            return ValueError(f"the workers do not exchange the same: {error}")
        if self.failed:
            return self.again()
        return self.lost(str(error), name, absence(self._absent(), horovods_limit()))

    def _absent(self) -> Sequence[int]:
        """Return the ranks that have not failed too; nothing where that can't be told."""
        if len(self._ranks) < 2 or elastic():  # there the launcher knows, and its store has gone on to the next workers
            return ()
        try:
            board = RendezvousBoard()
        except LookupError:
            return ()
        return absent_ranks(self._ranks, self._ranks.index(self._rank), board)


def _internal_error(text: str) -> Exception:
    from horovod.common.exceptions import HorovodInternalError

    error: Exception = HorovodInternalError(text)
    return error
