"""`Comm.start_push`: messages, destinations, received sums and the bytes that are counted."""

import numpy as np
import pytest

from hvd_slowmo.comm.protocol import MeteredComm, SoloComm
from hvd_slowmo.comm.threads import ThreadWorld, WorldError

# shares[i][j]: worker i's share of worker j's vector
SHARES = np.array([[0.0, 0.5, 0.25], [0.0, 0.0, 0.25], [1.0, 0.0, 0.0]])


def push(comm, length=2):
    x = np.full(length, 10.0**comm.rank)
    handle = comm.start_push("x", x, SHARES)
    x[:] = -1  # the caller may overwrite it at once
    return comm.wait(handle)


def test_each_gets_the_sum_of_the_shares_that_others_send():
    came = ThreadWorld(3).run(push)
    assert [c.tolist() for c in came] == [[30.0, 30.0], [25.0, 25.0], [1.0, 1.0]]


def test_nobody_sends():
    def work(comm):
        x = np.ones(3, np.float32)
        came = comm.wait(comm.start_push("x", x, np.zeros((2, 2))))
        assert came.dtype == np.float32
        return came.tolist()

    assert ThreadWorld(2).run(work) == [[0.0] * 3] * 2


def test_pushes_and_sums_may_be_under_way_together():
    def work(comm):
        pushed = comm.start_push("x", np.ones(1), np.eye(2)[::-1])
        total = comm.wait(comm.start_sum("x", np.full(1, comm.rank + 1.0)))
        return comm.wait(pushed).tolist(), total.tolist()

    assert ThreadWorld(2).run(work) == [([1.0], [3.0])] * 2


@pytest.mark.parametrize("length", [lambda rank: 2 + rank, lambda rank: 2])
def test_a_mismatch_raises_on_every_worker(length):
    def work(comm):
        if comm.rank == 1 and length(1) == 2:
            return comm.wait(comm.start_sum("x", np.ones(2)))
        return push(comm, length(comm.rank))

    for result in ThreadWorld(3).run(work, return_exceptions=True):
        assert isinstance(result, WorldError)
        assert "rank 0 started push 'x' (2,)" in str(result)


def test_bytes_are_counted_per_receiver():
    def work(comm):
        metered = MeteredComm(comm)
        push(metered)
        assert metered.seconds_waited >= 0
        return metered.bytes_sent

    assert ThreadWorld(3).run(work) == [16, 16, 32]


def test_alone_nothing_is_sent_and_nothing_comes():
    solo = MeteredComm(SoloComm())
    x = np.ones(2)
    assert solo.wait(solo.start_push("x", x, np.zeros((1, 1)))).tolist() == [0.0, 0.0]
    assert x.tolist() == [1.0, 1.0]
    assert solo.bytes_sent == 0
