"""The workers that train together, over the transport that the script or its launcher has chosen."""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch.distributed as dist

from hvd_slowmo.comm.horovod import Workers
from hvd_slowmo.comm.launcher import alone_text, launched
from hvd_slowmo.comm.protocol import Comm, SoloComm
from hvd_slowmo.comm.time_limit import time_limit
from hvd_slowmo_torch.comm.distributed import DistributedComm
from hvd_slowmo_torch.comm.groups import own_group
from hvd_slowmo_torch.comm.horovod import HorovodComm

Transport = Literal["horovod", "torch"]

horovod = Workers("horovod.torch", "PyTorch", "hvd_slowmo.torch", HorovodComm)

_shared: WeakKeyDictionary[Any, Comm] = WeakKeyDictionary()  # per process group, for what is no optimizer's


def init(transport: Transport | None = None, timeout: float | None = None) -> None:
    """Connect the workers: `hvd.init()` under horovodrun, `torch.distributed.init_process_group()` under torchrun.

    It does nothing where torch.distributed is initialized already, and prepares gradients="node" in any case.

    Args:
        transport: "horovod" or "torch" where the launcher does not tell.
        timeout: seconds that the others wait in an exchange for a worker that does not come, before all of them fail;
            longer than anything that one worker does alone, such as an evaluation. None for HVD_SLOWMO_TIMEOUT from
            the environment, or else PyTorch's 30 minutes, Horovod's none, and 300 seconds in an elastic job.

    Raises:
        TypeError: `timeout` is no number.
        ValueError: `transport` is another word, or both are initialized and it is not given;
            `timeout` is less than a second, or the workers are connected already.
        ImportError: Horovod is asked for, and not installed for PyTorch.
        TimeoutError: a worker has not come.
    """
    if chosen(transport=transport) == "horovod":
        if transport is not None or launched().workers > 1 or _installed():
            horovod.init(timeout)
        return
    limit = time_limit(timeout)
    if not dist.is_initialized():
        dist.init_process_group(timeout=None if limit is None else timedelta(seconds=limit))
    elif timeout is not None:
        raise ValueError(
            "a process group has its time limit from the start: give timeout= to init_process_group(), or call "
            "hvd_slowmo.torch.init(timeout=...) in place of it."
        )


def rank() -> int:
    """Return this worker's number among all; 0 alone.

    Example:
        >>> rank(), size(), local_rank()
        (0, 1, 0)
    """
    hvd = _ready_horovod()
    if _torch_is_ready():
        return dist.get_rank()
    return 0 if hvd is None else int(hvd.rank())


def size() -> int:
    """Return the number of workers; 1 alone."""
    hvd = _ready_horovod()
    if _torch_is_ready():
        return dist.get_world_size()
    return 1 if hvd is None else int(hvd.size())


def local_rank() -> int:
    """Return this worker's number among those of its machine, the number of its GPU; 0 alone."""
    hvd = _ready_horovod()
    if _torch_is_ready():
        return int(os.environ.get("LOCAL_RANK", "0"))
    return 0 if hvd is None else int(hvd.local_rank())


def chosen(process_set: Any = None, process_group: Any = None, transport: Transport | None = None) -> Transport:
    """Return the transport: the one that is named, the one that is initialized, or the launcher's.

    Raises:
        ValueError: they contradict each other, both are initialized and none is named, or it is another word.
    """
    if transport is not None and transport not in get_args(Transport):
        raise ValueError(f"`transport` must be 'horovod', 'torch' or None. Received: {transport!r}")
    named = {transport} - {None}
    if process_set is not None:
        named.add("horovod")
    if process_group is not None:
        named.add("torch")
    if len(named) > 1:
        raise ValueError(
            "a process_set is Horovod's and a process_group torch.distributed's: give one of them, and the transport "
            f"that it belongs to. Received: {process_set=}, {process_group=}, {transport=}"
        )
    if named:
        return "torch" if "torch" in named else "horovod"
    if _torch_is_ready():
        if _ready_horovod() is not None:
            raise ValueError(
                "both Horovod and torch.distributed are initialized. Say which one SlowMo shall use: "
                "transport='horovod' or transport='torch'."
            )
        return "torch"
    return "torch" if _ready_horovod() is None and launched().transport == "torch" else "horovod"


def connect(
    process_set: Any = None, process_group: Any = None, transport: Transport | None = None, *, node: bool = False
) -> Comm:
    """Return the workers to train with. With torch.distributed this is a collective of them.

    Args:
        process_set: Horovod's; None for all ranks.
        process_group: torch.distributed's; None for all ranks.
        transport: as in `chosen`.
        node: connect the workers of this one's node too, for gradients="node".

    Raises:
        ValueError, ImportError: as in `chosen` and `Workers.connect`.
    """
    if chosen(process_set, process_group, transport) == "horovod":
        return horovod.connect(process_set, node)
    group = _group_of(process_group)
    if group is None:
        solo = SoloComm()
        solo.node = SoloComm() if node else None
        return solo
    comm = DistributedComm(own_group(group))
    if node:
        comm.node = _node_of(comm)
    return comm


def shared(process_set: Any = None, process_group: Any = None, transport: Transport | None = None) -> Comm:
    """Return the same workers for collectives that belong to no optimizer; the arguments are those of `connect`."""
    if chosen(process_set, process_group, transport) == "horovod":
        return horovod.connect(process_set)
    group = _group_of(process_group)
    if group is None:
        return SoloComm()
    if group not in _shared:
        _shared[group] = DistributedComm(own_group(group))
    return _shared[group]


def _group_of(process_group: Any) -> Any:
    """Return the process group to train with; None for this process alone."""
    launch = launched()
    if not _torch_is_ready():
        if launch.workers > 1:
            raise ValueError(
                f"torch.distributed has not been initialized, and this is one of {launch.workers} workers. Call "
                "hvd_slowmo.torch.init() or torch.distributed.init_process_group() first."
            )
        return None
    if launch.workers > dist.get_world_size():
        raise ValueError(alone_text(launch, dist.get_world_size(), "torch.distributed"))
    group = dist.group.WORLD if process_group is None else process_group
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"rank {dist.get_rank()} is not in the process group. Construct SlowMo on the group's own ranks only."
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"`process_group` must be one of torch.distributed. Received: {type(process_group).__name__}")
    return None if dist.get_world_size(group) == 1 else group


def _node_of(comm: DistributedComm) -> Comm:
    """Return the workers of this one's node: those of its torchrun agent. A collective of all ranks."""
    places = comm.gather("slowmo.hosts", (socket.gethostname(), os.environ.get("GROUP_RANK")))
    mine: Comm = SoloComm()
    for place in dict.fromkeys(places):
        ranks = [rank for rank, other in enumerate(places) if other == place]
        if len(ranks) > 1:
            group = dist.new_group(ranks, timeout=comm.timeout, backend=comm.backend)
            if comm.rank in ranks:
                mine = DistributedComm(group)
    return mine


def _torch_is_ready() -> bool:
    return dist.is_available() and dist.is_initialized()


def _ready_horovod() -> Any:
    """Return Horovod's module if it is initialized. One that nobody has imported is not: importing it takes seconds."""
    hvd = sys.modules.get("horovod.torch")
    return hvd if hvd is not None and hvd.is_initialized() else None


def _installed() -> bool:
    try:
        import horovod.torch  # noqa: F401
    except ImportError:
        return False
    return True
