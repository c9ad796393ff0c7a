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
from hvd_slowmo.advice.link import Line
from hvd_slowmo.comm.protocol import Comm, SoloComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.layout import CHUNK_BYTES
from hvd_slowmo.settings import Bits
from hvd_slowmo_torch.optimizer import SlowMo

T = TypeVar("T")

_ROWS = 16, 8192  # of 4 KiB: a short vector, and 32 MiB, which no processor's cache holds beside anchor and momentum
_COLUMNS = 1024
_REPEATS = 5
_LATE: tuple[Bits, ...] = (32, 16, 8, 4)


class _Idle(torch.optim.SGD):
    """Inner optimizer that does nothing."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch overloads it
        pass


class _TimedSolo(SoloComm):
    """One worker on its own that counts the seconds of exchanges beside it, which it makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def start_beside(self, work: Callable[[Comm], T]) -> T:
        started = time.perf_counter()
        try:
            return work(self)
        finally:
            self.seconds += time.perf_counter() - started


def measure_host(comm: Comm) -> Host:
    """Return the processors' part in exchanges, on the slowest worker. A collective: all are busy at once.

    Example:
        >>> host = measure_host(SoloComm())
        >>> host.slowmo.own.per_byte > 0, host.late_work(8).beside.per_byte > 0
        (True, True)
    """
    late = [SlowMoConfig(tau=1, delay=1, bits=bits) for bits in _LATE]
    configs = [SlowMoConfig.local_sgd(1), SlowMoConfig(tau=1), *late]
    comm.gather("advise.begin", None)
    own = [_work_of(config) for config in configs]
    machines = comm.gather("advise.host", (socket.gethostname(), _cores(), own))
    names = [name for name, _, _ in machines]
    cores = min(count / names.count(name) for name, count, _ in machines)
    slowest = [max(works, key=_total) for works in zip(*(works for _, _, works in machines), strict=True)]
    average, slowmo, *others = slowest
    return Host(cores, average, slowmo, tuple(zip(_LATE, others, strict=True)))


def _total(work: Work) -> float:
    return work.both.seconds(CHUNK_BYTES)


def _work_of(config: SlowMoConfig) -> Work:
    """Return the work of an outer step: that of a short vector, and the slope from there to a long one."""
    short, long = (_seconds_of(config, rows) for rows in _ROWS)
    more = 4 * _COLUMNS * (_ROWS[1] - _ROWS[0])
    return Work(*(Line(least, max(0.0, most - least) / more) for least, most in zip(short, long, strict=True)))


def _seconds_of(config: SlowMoConfig, rows: int) -> tuple[float, float]:
    """Return the median seconds of an outer step, in the thread that trains and beside it."""
    model = nn.ParameterList([nn.Parameter(torch.ones(rows, _COLUMNS))])
    comm = _TimedSolo()
    optimizer = SlowMo(_Idle(model.parameters(), lr=0.1), model, config, comm=comm, name="advise")
    own, beside = [], []
    for _ in range(_REPEATS + 1):  # the first one warms up
        comm.seconds, started = 0.0, time.perf_counter()
        optimizer.step()
        own.append(time.perf_counter() - started - comm.seconds)
        beside.append(comm.seconds)
    return statistics.median(own[1:]), statistics.median(beside[1:])


def _cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
