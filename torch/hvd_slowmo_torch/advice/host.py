"""Measuring the processors' part in exchanges: outer steps of one worker, which sends nothing."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from hvd_slowmo.advice.host import Host, Work
from hvd_slowmo.comm.protocol import Comm, SoloComm
from hvd_slowmo.config import Bits, SlowMoConfig
from hvd_slowmo_torch.optimizer import SlowMo

T = TypeVar("T")

_ROWS, _COLUMNS = 8192, 1024  # 32 MiB in float32, which no processor's cache holds beside anchor and momentum
_REPEATS = 5
_LATE: tuple[Bits, ...] = (32, 16, 8, 4)


class _Idle(torch.optim.SGD):
    """Inner optimizer that does nothing."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch overloads it
        pass


class _TimedSolo(SoloComm):
    """One worker on its own that counts the processor seconds of exchanges beside it, which it makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def start_beside(self, work: Callable[[Comm], T]) -> T:
        started = time.process_time()
        try:
            return work(self)
        finally:
            self.seconds += time.process_time() - started


def measure_host(comm: Comm) -> Host:
    """Return the processors' part in exchanges, on the slowest worker. A collective: all are busy at once.

    Example:
        >>> host = measure_host(SoloComm())
        >>> host.slowmo.own > 0, host.late_work(8).beside > 0
        (True, True)
    """
    late = [SlowMoConfig(tau=1, delay=1, bits=bits) for bits in _LATE]
    configs = [SlowMoConfig.local_sgd(1), SlowMoConfig(tau=1), *late]
    comm.gather("advise.begin", None)
    own = [_work_of(config) for config in configs]
    machines = comm.gather("advise.host", (socket.gethostname(), _cores(), own))
    names = [name for name, _, _ in machines]
    cores = min(count / names.count(name) for name, count, _ in machines)
    slowest = [max(works, key=sum) for works in zip(*(works for _, _, works in machines), strict=True)]
    average, slowmo, *others = slowest
    return Host(cores, average, slowmo, tuple(zip(_LATE, others, strict=True)))


def _work_of(config: SlowMoConfig) -> Work:
    """Return the median work of an outer step."""
    model = nn.ParameterList([nn.Parameter(torch.ones(_ROWS, _COLUMNS))])
    comm = _TimedSolo()
    optimizer = SlowMo(_Idle(model.parameters(), lr=0.1), model, config, comm=comm, name="advise")
    length = 4 * _ROWS * _COLUMNS
    works = []
    for _ in range(_REPEATS + 1):  # the first one warms up
        comm.seconds, started = 0.0, time.process_time()
        optimizer.step()
        whole = time.process_time() - started
        works.append(Work((whole - comm.seconds) / length, comm.seconds / length))
    return Work(*(statistics.median(values) for values in zip(*works[1:], strict=True)))


def _cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
