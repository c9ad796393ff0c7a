"""Horovod with a process set per node, for gradients="node"."""

from __future__ import annotations

import os
import socket
from typing import Any

from hvd_slowmo.comm import Comm, SoloComm
from hvd_slowmo_torch.comm import HorovodComm

# What init() has registered: the ranks of each node, and Horovod's process sets of those with several workers.
_nodes: list[list[int]] = []
_sets: list[Any] = []


def init() -> None:
    """`hvd.init()`, with the workers of each node registered as a process set.

    Static process sets, which Horovod takes at its start only: dynamic ones slow every collective down. So Horovod is
    started once to learn who is where, and once more with the sets.

    Raises:
        ImportError: Horovod is not installed for PyTorch.
    """
    import horovod.torch as hvd

    hvd.init()
    # horovodrun's name for the host: "nodes" may be several names of one machine.
    host = os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname()
    comm: Comm = SoloComm() if hvd.size() == 1 else HorovodComm(hvd.global_process_set)
    hosts = comm.gather("slowmo.hosts", host)
    nodes = [[rank for rank, other in enumerate(hosts) if other == each] for each in dict.fromkeys(hosts)]
    hvd.shutdown()
    # One worker needs no set, and all of them are the global one.
    _sets[:] = [hvd.ProcessSet(ranks) for ranks in nodes if 1 < len(ranks) < len(hosts)]
    _nodes[:] = nodes
    hvd.init(process_sets=list(_sets))


def connect_node() -> Comm:
    """The workers of this node, this one included.

    Raises:
        ValueError: Horovod was not started by `init()`.
    """
    import horovod.torch as hvd

    if not _nodes:
        raise ValueError(
            "gradients='node' needs a process set per node. Call hvd_slowmo.torch.init() in place of hvd.init()."
        )
    ranks = next(ranks for ranks in _nodes if hvd.rank() in ranks)
    if len(ranks) == 1:
        return SoloComm()
    return HorovodComm(next((s for s in _sets if s.included()), hvd.global_process_set))
