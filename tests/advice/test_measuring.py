"""Measuring a link, on workers whose collectives take a known time."""

import numpy as np
import pytest

from hvd_slowmo.advice import measuring
from hvd_slowmo.advice.measuring import Neighbours, measure_link
from hvd_slowmo.comm.threads import ThreadWorld
from support.own_time import OwnTime

LENGTHS = (4096, 65536, 4 * 65536)


@pytest.fixture
def clock(monkeypatch):
    own = OwnTime()
    monkeypatch.setattr(measuring, "time", own)
    return own


class SlowComm:
    """Another Comm, whose collectives take a latency and a time per byte; pushes of one rank take thrice as long."""

    def __init__(self, comm, clock, slow_rank):
        self._comm, self._clock, self._slow = comm, clock, slow_rank
        self.rank, self.size, self.ranks, self.node = comm.rank, comm.size, comm.ranks, None
        self.started = []

    def start_sum(self, name, x):
        return self._started(name, x.nbytes, self._comm.start_sum(name, x))

    def start_push(self, name, x, shares):
        sends = shares[:, self.rank].any()
        factor = 3 if self.rank == self._slow else 1
        return self._started(name, factor * sends * x.nbytes, self._comm.start_push(name, x, shares))

    def start_alltoall(self, name, parts):
        return self._started(name, sum(map(len, parts)), self._comm.start_alltoall(name, parts))

    def start_allgather(self, name, x, lengths):
        return self._started(name, sum(lengths), self._comm.start_allgather(name, x, lengths))

    def gather(self, name, item):
        return self._comm.gather(name, item)

    def wait(self, handle):
        own, seconds = handle
        self._clock.pass_by(seconds, work=seconds / 4)
        return self._comm.wait(own)

    def _started(self, name, length, handle):
        self.started.append((name, length))
        return handle, 0.001 + 5e-8 * length


def test_latency_and_bandwidth_of_each_collective_are_found(clock):
    link, neighbours = ThreadWorld(3).run(lambda comm: measure_link(SlowComm(comm, clock, 1), np.zeros, LENGTHS))[0]
    assert link.workers == 3
    for line in (link.sums, link.alltoalls, link.allgathers):
        assert line.latency == pytest.approx(0.001 + 5e-8 * 4096, rel=0.01)  # a third of a length is rounded
        assert line.per_byte == pytest.approx(5e-8, rel=0.01)
        assert line.work == pytest.approx((0.001 / LENGTHS[-1] + 5e-8) / 4, rel=0.01)
    assert link.pushes.per_byte == pytest.approx(15e-8)  # the slowest worker's
    assert neighbours.slowest == 1
    short, longer = (0.001 + factor * 5e-8 * LENGTHS[-1] for factor in (1, 3))
    assert neighbours.spread == pytest.approx(longer / short)


def test_all_workers_find_the_same():
    found = ThreadWorld(2).run(lambda comm: measure_link(comm, np.zeros, LENGTHS[:2]))
    assert found[0] == found[1]


def test_lengths_that_take_too_long_are_left_out(monkeypatch, clock):
    monkeypatch.setattr(measuring, "LONGEST_S", 0.005)

    def work(comm):
        slow = SlowComm(comm, clock, 0)
        measure_link(slow, np.zeros, LENGTHS)
        return [name for name, _ in slow.started]

    names = ThreadWorld(2).run(work)[0]
    assert "advise.sum.65536" in names
    assert "advise.sum.262144" not in names


def test_the_spread_is_between_the_fastest_and_the_slowest():
    assert Neighbours((0.2, 0.1, 0.3)).slowest == 2
    assert Neighbours((0.2, 0.1, 0.3)).spread == pytest.approx(3)
