"""Measuring the links between the workers, through the transport that trains: sums, messages and gathers.

Each collective is repeated at a few lengths. The slowest worker's time counts, since all wait for it, and the median of
the repetitions. The latency is the time of the shortest message. The time per byte is the slope between the two longest
ones, because a network's bursts and a processor's caches make short messages faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from hvd_slowmo.advice.link import Line, Link
from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.core.parts.layout import CHUNK_BYTES

Zeros = Callable[[int, Literal["float32", "uint8"]], Any]
"""Makes a tensor of so many elements, of the framework whose transport it is."""

LENGTHS = (2**12, 2**20, 2**22, CHUNK_BYTES)
"""Bytes of the vectors."""

REPEATS = 5
LONGEST_S = 3.0
"""A length is left out where it would take longer, as far as the one before tells."""

_NEIGHBOURS_S = 3.0  # for the messages between neighbours, all together, as far as the longest pushes tell


class Neighbours(NamedTuple):
    """Seconds of one message from each worker to the next one alone, with nothing else on the network.

    Attributes:
        seconds: by the sender's rank; the last one sends to rank 0.
    """

    seconds: tuple[float, ...]

    @property
    def slowest(self) -> int:
        """Rank of the sender of the slowest message."""
        return max(range(len(self.seconds)), key=lambda rank: self.seconds[rank])

    @property
    def spread(self) -> float:
        """Ratio of the slowest message's time to the fastest's.

        Example:
            >>> Neighbours((0.1, 0.2, 0.1)).spread
            2.0
        """
        return max(self.seconds) / min(self.seconds)


def measure_link(comm: Comm, zeros: Zeros, lengths: Sequence[int] = LENGTHS) -> tuple[Link, Neighbours]:
    """Return the link between the workers. A collective.

    Args:
        comm: at least two workers.
        zeros: makes a tensor.
        lengths: of the vectors, in bytes, from the shortest; at least two.

    Example:
        >>> from hvd_slowmo.comm.threads import ThreadWorld
        >>> link, _ = ThreadWorld(2).run(lambda comm: measure_link(comm, np.zeros, [4096, 65536]))[0]
        >>> link.workers, link.sums.latency > 0
        (2, True)
    """
    meter = _Meter(comm, zeros)
    shares = _to_the_next(comm.size)
    link = Link(
        workers=comm.size,
        sums=meter.line("sum", meter.sum_of, lengths),
        pushes=meter.line("push", partial(meter.push_of, shares=shares), lengths),
        alltoalls=meter.line("alltoall", meter.alltoall_of, lengths),
        allgathers=meter.line("allgather", meter.allgather_of, lengths),
    )
    return link, meter.neighbours(link, lengths[-1])


_Start = Callable[[str], Any]
"""Starts a collective of this name, over a tensor that exists already; returns its handle."""


class _Sample(NamedTuple):
    seconds: float
    work: float  # processor seconds of this process


class _Meter:
    """Times collectives; all workers call the same methods in the same order."""

    def __init__(self, comm: Comm, zeros: Zeros) -> None:
        self._comm, self._zeros = comm, zeros

    def line(self, name: str, prepare: Callable[[int], _Start], lengths: Sequence[int]) -> Line:
        """Measure a collective at all lengths that do not take too long."""
        times: list[float] = []
        works: list[float] = []
        for number, length in enumerate(lengths):
            if number > 1 and times[-1] * length / lengths[number - 1] > LONGEST_S:
                break
            sample = self.median(f"{name}.{length}", prepare(length))
            times.append(sample.seconds)
            works.append(sample.work)
        last = len(times) - 1
        per_byte = max(0.0, times[last] - times[last - 1]) / (lengths[last] - lengths[last - 1])
        return Line(times[0], per_byte, works[last] / lengths[last])

    def median(self, name: str, start: _Start) -> _Sample:
        """Return the median over the repetitions of the slowest worker's time; the same on all workers."""
        comm, ready = self._comm, self._zeros(1, "float32")
        samples: list[_Sample] = []
        for _ in range(REPEATS + 1):  # the first one warms up
            comm.wait(comm.start_sum("advise.ready", ready))
            begun, worked = time.perf_counter(), time.process_time()
            comm.wait(start(f"advise.{name}"))
            samples.append(_Sample(time.perf_counter() - begun, time.process_time() - worked))
        by_worker = comm.gather("advise.samples", samples[1:])
        slowest = [_Sample(*map(max, zip(*each, strict=True))) for each in zip(*by_worker, strict=True)]
        return _Sample(*(statistics.median(values) for values in zip(*slowest, strict=True)))

    def neighbours(self, link: Link, longest: int) -> Neighbours:
        """Let one worker after another send a message to the next one."""
        workers, short = link.workers, _NEIGHBOURS_S / (link.workers * (REPEATS + 1))
        length = int(min(longest, max(4096, short / max(link.pushes.per_byte, 1e-12))))
        seconds = []
        for sender in range(workers):
            shares = _to_the_next(workers)
            shares[:, [rank for rank in range(workers) if rank != sender]] = 0
            seconds.append(self.median(f"neighbour.{sender}", self.push_of(length, shares)).seconds)
        return Neighbours(tuple(seconds))

    def sum_of(self, length: int) -> _Start:
        x = self._zeros(length // 4, "float32")
        return lambda name: self._comm.start_sum(name, x)

    def push_of(self, length: int, shares: Any) -> _Start:
        x = self._zeros(length // 4, "float32")
        return lambda name: self._comm.start_push(name, x, shares)

    def alltoall_of(self, length: int) -> _Start:
        size = self._comm.size
        parts = [self._zeros(length // size, "uint8") for _ in range(size)]
        return lambda name: self._comm.start_alltoall(name, parts)

    def allgather_of(self, length: int) -> _Start:
        size = self._comm.size
        part = self._zeros(length // size, "uint8")
        return lambda name: self._comm.start_allgather(name, part, [length // size] * size)


def _to_the_next(workers: int) -> Any:
    """Return shares with which each worker sends to the next one, as in SGP's first step."""
    return np.roll(np.eye(workers), 1, axis=0) / 2
