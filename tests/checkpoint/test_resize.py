"""Checkpoints on another number of workers."""

import numpy as np
import pytest
import torch

from hvd_slowmo.comm.threads import ThreadWorld
from support.checkpoints import RESET, loaded, saved
from support.problems import LOCAL_SGD, Problem
from support.trainings.pytorch import advance, build, same

AVERAGED = Problem({"tau": 4, "inner_state": "average"}, options={"momentum": 0.875})
MAINTAINED = Problem({"tau": 4}, options={"momentum": 0.875})
AR_SGD = Problem({"tau": None, **LOCAL_SGD, "gradients": "all"}, options={"momentum": 0.5})
NOAVERAGE = Problem({"gossip": "sgp", "topology": "star", "tau": 4, "average": False})
RESIZES = {
    "an outer step": (RESET, 4, False, None),
    "buffers averaged": (AVERAGED, 4, False, None),
    "no buffers": (Problem({"tau": 4}), 8, False, None),
    "gradients averaged": (AR_SGD, 3, False, None),
    "a join": (Problem({"tau": 4}), 6, True, None),
    "gossip at an outer step": (Problem({"gossip": "sgp", "overlap": True, "tau": 4}), 4, False, None),
    "before the first step": (MAINTAINED, 0, False, None),
    "the middle of a block": (RESET, 5, False, "its own parameters and statistics.*inner optimizer state"),
    "buffers maintained": (MAINTAINED, 4, False, "its own inner optimizer state, which.*inner_state='reset'"),
    "a join with buffers": (RESET, 6, True, "its own inner optimizer state"),
    "gossip": (Problem({"gossip": "sgp", "topology": "star", "tau": 4}), 3, False, "its own parameters.*numerators"),
    "in flight": (Problem({"gossip": "sgp", "overlap": True, "tau": 4}), 3, False, "its own .*messages in flight"),
    "noaverage": (NOAVERAGE, 4, False, "its own .*slow momentum"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", RESIZES)
def test_another_number_of_workers_where_nothing_of_a_worker_is_lost(what, tmp_path):
    problem, steps, join, message = RESIZES[what]
    before = saved(tmp_path / "checkpoint", 2, steps, problem, join)
    if message is not None:
        with pytest.raises(ValueError, match=f"one of 2 workers, this job has 3, and each of those has {message}"):
            loaded(tmp_path / "checkpoint", 3, problem)
        return
    for workers in (1, 3):
        for each in loaded(tmp_path / "checkpoint", workers, problem):
            assert all(same(each[key], before[0][key]) for key in ("x", "anchor", "v") if key in each)
        assert np.isfinite(loaded(tmp_path / "checkpoint", workers, problem, then=5)[0]["x"]).all()


def test_workers_that_are_equal_up_to_rounding_keep_their_own_and_any_one_serves_all(tmp_path):
    """As those of two frameworks are after an outer step."""

    def work(comm):
        model, optimizer = build(RESET, comm, comm.rank)
        advance(RESET, model, optimizer, comm.rank, range(4))
        if comm.rank == 1:
            with torch.no_grad():
                model.parts[0] *= 1 + 2.0**-52
        optimizer.save(tmp_path / "checkpoint")
        return model.flat()

    before = ThreadWorld(2).run(work)
    assert not same(*before)
    assert all(same(each["x"], mine) for each, mine in zip(loaded(tmp_path / "checkpoint", 2), before, strict=True))
    assert all(same(each["x"], before[0]) for each in loaded(tmp_path / "checkpoint", 3))


def test_rates_that_are_equal_up_to_rounding_or_differ_are_those_of_rank_0_for_another_number(tmp_path):
    for rates in ((0.1, float(np.float32(0.1))), (0.1, 0.2)):

        def work(comm, rates=rates):
            model, optimizer = build(RESET, comm, comm.rank)
            advance(RESET, model, optimizer, comm.rank, range(4))
            for group in optimizer.param_groups:
                group["lr"] = rates[comm.rank]
            optimizer.save(tmp_path / "checkpoint")

        def rate(comm):
            _, optimizer = build(RESET, comm, comm.rank)
            optimizer.load(tmp_path / "checkpoint")
            return optimizer.param_groups[0]["lr"]

        ThreadWorld(2).run(work)
        assert ThreadWorld(2).run(rate) == list(rates), "as many workers have their own"
        assert ThreadWorld(3).run(rate) == [0.1] * 3
