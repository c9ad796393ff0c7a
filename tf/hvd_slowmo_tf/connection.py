"""The workers of one optimizer, and the name under which they exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvd_slowmo.comm.naming import distinct_name
from hvd_slowmo.comm.protocol import Comm, ScopedComm
from hvd_slowmo_tf.horovod import workers


class Connection:
    """Connects at the first use: an optimizer is made before Horovod is initialized, or without it.

    Args:
        prefix: of the collectives' names: the optimizer's name when it is constructed.
        process_set: the Horovod process set that trains together; None for all ranks.
        comm: the workers, in place of Horovod's.
        node: also among the workers of a machine.
        met: called with the workers, and with others that take their place.
    """

    def __init__(
        self, prefix: str, process_set: Any, comm: Comm | None, *, node: bool, met: Callable[[Comm], None]
    ) -> None:
        self._prefix, self._process_set, self._node, self._met = prefix, process_set, node, met
        self._comm = comm
        self._distinct: str | None = None

    @property
    def workers(self) -> Comm:
        """The workers themselves."""
        if self._comm is None:
            self.replace(workers.connect(self._process_set, node=self._node))
        assert self._comm is not None, "connected"
        return self._comm

    @property
    def comm(self) -> ScopedComm:
        """The workers under the optimizer's name."""
        return ScopedComm(self.workers, self.name)

    @property
    def name(self) -> str:
        """The optimizer's name, or a distinct one if it is not the first of that name to start."""
        return self._distinct or self._prefix

    def take_name(self) -> None:
        """Take a distinct name: the first act of the start, the same on all workers."""
        if self._distinct is None:
            self._distinct = distinct_name(self.workers, self._prefix)

    def replace(self, comm: Comm) -> None:
        """Go on with these workers."""
        self._comm = comm
        self._met(comm)
