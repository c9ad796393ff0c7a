"""Gossip in the PyTorch adapter equals the dense oracle on Horovod workers."""

import numpy as np
import pytest

from hvd_slowmo.topology.analysis import out_degree
from hvd_slowmo.topology.checks import topology
from support.problems import GOSSIP, distance
from support.trainings.pytorch import same

TOLERANCE = 1e-12
SIZES = [
    2,
    *(pytest.param(size, marks=[pytest.mark.slow, pytest.mark.thorough]) for size in (3, 4, 5)),
]
pytestmark = pytest.mark.workers


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.slow
def test_equal_to_the_oracle(workers, size):
    for name, problem in GOSSIP.items():
        if problem.config.get("topology") == "bipartite" and size % 2:
            continue
        histories = workers(size).run("support.trainings.pytorch:run", problem=problem, chunk_bytes=40)
        assert distance(histories, problem) < TOLERANCE, name


@pytest.mark.slow
def test_resume_in_the_middle_of_a_flight(workers):
    """Bitwise identical, hence two workers: with more, the order of summation depends on Horovod's fusion."""
    for name in ("osgp", "osgp, star, slowmo, noaverage", "osgp, slowmo, warm-up, average"):
        whole = workers(2).run("support.trainings.pytorch:run", problem=GOSSIP[name])
        for stop in (4, 7):
            again = workers(2).run("support.trainings.pytorch:resumed", problem=GOSSIP[name], stop=stop)
            assert same([history[1:] for history in whole], again), name


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.thorough
def test_joins_with_uneven_data(workers, size):
    plan = [(*lengths, 5)[:size] for lengths in [(6, 3, 9), (4, 4, 4), (0, 2, 13), (0, 0, 0), (7, 8, 2)]]
    for name, problem in GOSSIP.items():
        histories = workers(size).run("support.trainings.pytorch:epochs", problem=problem, plan=plan)
        for number, joined in enumerate(s for s in problem.gossip_reference(size, plan) if s.joined):
            for rank, history in enumerate(histories):
                np.testing.assert_allclose(history[number]["x"], joined.z[rank], rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("size", SIZES[:3:2])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.slow
def test_a_step_sends_as_many_vectors_as_the_graph_has_edges_from_a_worker(workers, size, overlap):
    for name in ("exponential", "complete", "full"):
        config = {"gossip": "sgp", "tau": None, "alpha": 1.0, "beta": 0.0, "topology": name, "overlap": overlap}
        for rank, sent in enumerate(
            workers(size).run("support.jobs.pytorch_gossip:bytes_per_step", config=config, steps=5)
        ):
            degrees = out_degree(topology(name, size))[:, rank]
            assert sent == [4000 * degrees[k % len(degrees)] for k in range(5)], name
