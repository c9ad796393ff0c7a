"""Gossip bases in the PyTorch adapter equal the dense-matrix oracle."""

import numpy as np
import pytest
from problems import GOSSIP, distance
from torch_training import epochs, resumed, run, same

from hvd_slowmo.comm import ThreadWorld

TOLERANCE = 1e-12


@pytest.mark.parametrize("name", GOSSIP)
@pytest.mark.parametrize("size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_threads_equal_the_oracle(name, size):
    problem = GOSSIP[name]
    histories = ThreadWorld(size).run(lambda comm: run(problem, comm, 40))
    assert distance(histories, problem) < TOLERANCE


# At every step: test_gossip_state.py.
@pytest.mark.parametrize("name", ["osgp", "osgp, slowmo", "osgp, star, slowmo, noaverage"])
def test_resume_in_the_middle_of_a_flight(name):
    problem = GOSSIP[name]
    whole = ThreadWorld(3).run(lambda comm: run(problem, comm))
    for stop in (2, 5, 7):
        again = ThreadWorld(3).run(lambda comm, stop=stop: resumed(problem, stop, comm))
        assert same([history[1:] for history in whole], again), stop


PLAN = [(6, 3, 5), (4, 4, 4), (0, 5, 1), (0, 0, 0), (7, 2, 30)]


@pytest.mark.parametrize("name", GOSSIP)
def test_joins_with_uneven_data_equal_the_oracle(name):
    problem = GOSSIP[name]
    histories = ThreadWorld(3).run(lambda comm: epochs(problem, PLAN, comm))
    joins = [snapshot for snapshot in problem.gossip_reference(3, PLAN) if snapshot.joined]
    for number, snapshot in enumerate(joins):
        for rank, history in enumerate(histories):
            np.testing.assert_allclose(history[number]["x"], snapshot.z[rank], rtol=0, atol=TOLERANCE)
            assert history[number]["step"] == snapshot.step
            assert history[number]["behind"] == snapshot.behind[rank]
