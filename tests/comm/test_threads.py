"""ThreadWorld: sums, and errors on every worker for any difference between workers."""

import time

import numpy as np
import pytest

from hvd_slowmo.comm.protocol import ScopedComm, SoloComm
from hvd_slowmo.comm.threads import ThreadWorld, WorldError
from hvd_slowmo.core.start.handshake import agree


def test_sums_and_gathers_in_rank_order():
    def work(comm):
        x = np.full(3, comm.rank + 1.0)
        handle = comm.start_sum("x", x)
        x[:] = 100  # too late to affect the sum
        total = comm.wait(handle)
        assert total is x  # as in Horovod's in-place sums
        return total.tolist(), comm.gather("g", comm.rank)

    assert ThreadWorld(4).run(work) == [([10.0] * 3, [0, 1, 2, 3])] * 4


def start_in_order(comm, names):
    first, _ = [comm.start_sum(name, np.zeros(1)) for name in names]
    return first


def test_a_mismatch_is_found_whoever_comes_last():
    def work(comm):
        time.sleep(0.2 * (comm.rank == 0))
        return comm.wait(comm.start_sum("ab"[comm.rank], np.ones(1)))

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert "rank 0 started sum 'a' (1,) float64, rank 1 sum 'b' (1,) float64" in str(result)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (lambda comm: comm.start_sum("b" if comm.rank == 1 else "a", np.zeros(2)), "rank 1 sum 'b'"),
        (lambda comm: comm.start_sum("a", np.zeros(2 + comm.rank // 2)), r"rank 2 sum 'a' \(3,\)"),
        (lambda comm: comm.start_sum("a", np.zeros(2, np.float32 if comm.rank else float)), "float32"),
        (lambda comm: start_in_order(comm, "ba" if comm.rank == 2 else "ab"), "rank 2 sum 'b'"),
    ],
)
def test_a_mismatch_raises_on_every_worker(start, words):
    results = ThreadWorld(3).run(lambda comm: comm.wait(start(comm)), return_exceptions=True)
    for result in results:
        assert isinstance(result, WorldError)
        with pytest.raises(WorldError, match=words):
            raise result


def test_a_worker_that_fails_or_ends_is_an_error_in_the_others():
    def fails(comm):
        if comm.rank == 1:
            raise KeyError("lost")
        return comm.wait(comm.start_sum("x", np.zeros(1)))

    first, second = ThreadWorld(2).run(fails, return_exceptions=True)
    assert "rank 1 failed with KeyError: 'lost' while others wait in sum 'x'" in str(first)
    assert isinstance(second, KeyError)

    def ends(comm):
        return comm.rank == 1 or comm.wait(comm.start_sum("x", np.zeros(1)))

    with pytest.raises(WorldError, match="rank 1 ended while others wait"):
        ThreadWorld(3).run(ends)


def test_a_world_has_workers():
    with pytest.raises(ValueError, match="size=0"):
        ThreadWorld(0)


def test_agreement_names_the_rank_and_the_first_difference(caplog):
    def differ(comm):
        facts = {"config": {"tau": 3 if comm.rank < 2 else 4, "beta": comm.rank}, "parameters": [["w", 1]]}
        agree(ScopedComm(comm, "slowmo"), facts, {}, None)

    for result in ThreadWorld(3).run(differ, return_exceptions=True):
        assert isinstance(result, ValueError)
        assert "rank 1 differs from rank 0: config: beta: it has 1 where 0 is expected" in str(result)

    def more(comm):
        agree(ScopedComm(comm, "slowmo"), {"parameters": [["w", 1], ["b", 2]][: 2 - comm.rank]}, {}, None)

    for result in ThreadWorld(2).run(more, return_exceptions=True):
        assert "it has 1 entries where 2 are expected" in str(result)

    ThreadWorld(2).run(lambda comm: agree(ScopedComm(comm, "slowmo"), {}, {"PyTorch": f"2.{comm.rank}"}, None))
    assert "PyTorch differs: rank 1 has 2.1, rank 0 has 2.0" in caplog.text


def test_an_error_on_one_worker_is_heard_by_all():
    def wrong(comm):
        agree(ScopedComm(comm, "slowmo"), {}, {}, ValueError("no such model") if comm.rank == 1 else None)

    for result in ThreadWorld(2).run(wrong, return_exceptions=True):
        assert isinstance(result, ValueError)
        assert "rank 1: no such model" in str(result)


def test_alone_nothing_is_sent():
    x = np.ones(2)
    solo = SoloComm()
    assert solo.wait(solo.start_sum("x", x)) is x
    agree(ScopedComm(solo, "slowmo"), {"a": 1}, {}, None)
