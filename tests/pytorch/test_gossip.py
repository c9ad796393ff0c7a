"""The gossip methods in the PyTorch adapter equal the dense-matrix oracle."""

import copy

import numpy as np
import pytest
import torch

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo
from support.problems import ALONE, GOSSIP, config_of, distance
from support.trainings.pytorch import advance, build, epochs, resumed, run, same

TOLERANCE = 1e-12


@pytest.mark.parametrize("name", GOSSIP)
@pytest.mark.parametrize("size", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.sample(every=3)
def test_threads_equal_the_oracle(name, size):
    problem = GOSSIP[name]
    histories = ThreadWorld(size).run(lambda comm: run(problem, comm, 40))
    assert distance(histories, problem) < TOLERANCE


@pytest.mark.slow
# test_gossip_state.py checks it at every step.
@pytest.mark.parametrize("name", ["osgp", "osgp, slowmo", "osgp, star, slowmo, noaverage"])
def test_resume_in_the_middle_of_a_flight(name):
    problem = GOSSIP[name]
    whole = ThreadWorld(3).run(lambda comm: run(problem, comm))
    for stop in (2, 5, 7):
        again = ThreadWorld(3).run(lambda comm, stop=stop: resumed(problem, stop, comm))
        assert same([history[1:] for history in whole], again), stop


@pytest.mark.slow
@pytest.mark.parametrize("name", GOSSIP)
def test_a_training_that_goes_back_does_not_mix_what_it_sent_since(name):
    problem = GOSSIP[name]

    def there_and_back(comm):
        model, optimizer = build(problem, comm, comm.rank)
        advance(problem, model, optimizer, comm.rank, range(4))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        first = advance(problem, model, optimizer, comm.rank, range(4, 9))
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        return same(first, advance(problem, model, optimizer, comm.rank, range(4, 9)))

    assert ThreadWorld(3).run(there_and_back) == [True] * 3


@pytest.mark.parametrize("settings", [{"overlap": True}, {"topology": "star"}])
def test_a_group_is_added_where_nothing_is_in_flight(settings):
    def work(comm):
        model = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.full((2,), x, dtype=torch.float64)) for x in (1.0, 5.0)]
        )
        for p in model:
            p.grad = torch.zeros_like(p)
        base = torch.optim.SGD([model[0]], lr=0.0)
        optimizer = SlowMo(base, model, config_of({"gossip": "sgp", **ALONE, **settings}), comm=comm)
        for _ in range(3):
            optimizer.step()
        with pytest.raises(ValueError, match=r"parameters can.t be added while messages are on their way"):
            optimizer.add_param_group({"params": [model[1]]})
        optimizer.join()
        optimizer.add_param_group({"params": [model[1]]})
        for _ in range(3):
            optimizer.step()
        return [p.tolist() for p in model]

    for found in ThreadWorld(3).run(work):
        np.testing.assert_allclose(found, [[1.0, 1.0], [5.0, 5.0]], rtol=0, atol=TOLERANCE)


PLAN = [(6, 3, 5), (4, 4, 4), (0, 5, 1), (0, 0, 0), (7, 2, 30)]


@pytest.mark.slow
@pytest.mark.parametrize("name", GOSSIP)
@pytest.mark.sample(every=2)
def test_joins_with_uneven_data_equal_the_oracle(name):
    problem = GOSSIP[name]
    histories = ThreadWorld(3).run(lambda comm: epochs(problem, PLAN, comm))
    joins = [snapshot for snapshot in problem.gossip_reference(3, PLAN) if snapshot.joined]
    for number, snapshot in enumerate(joins):
        for rank, history in enumerate(histories):
            np.testing.assert_allclose(history[number]["x"], snapshot.z[rank], rtol=0, atol=TOLERANCE)
            assert history[number]["step"] == snapshot.step
            assert history[number]["behind"] == snapshot.behind[rank]
