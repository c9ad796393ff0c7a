"""Gossip in the Keras adapter on Horovod workers: in a loop of one's own and under `fit`, equal to the dense oracle."""

import numpy as np
import pytest

from hvd_slowmo.topology.checks import topology
from reference.gossip import run_gossip
from support.jobs import keras_gossip as jobs
from support.problems import GOSSIP, distance
from support.trainings.pytorch import same

SAME = {name: problem for name, problem in GOSSIP.items() if problem.same_everywhere}
TOLERANCE = 1e-12
OSGP = {"gossip": "sgp", "overlap": True, "topology": "star", "tau": 4}
pytestmark = [pytest.mark.workers, pytest.mark.slow]


@pytest.mark.thorough
@pytest.mark.parametrize("size", [2, 3])
def test_equal_to_the_oracle(keras_workers, size):
    """All on two workers; on three what differs there, since each problem is traced anew."""
    three = ("osgp, star, slowmo, Adam", "dpsgd, slowmo", "sgp, complete, slowmo", "osgp, star, slowmo, noaverage")
    for name, problem in SAME.items():
        if size == 3 and name not in three:
            continue
        histories = keras_workers(size).run("support.trainings.keras:run", problem=problem, chunk_bytes=40)
        assert distance(histories, problem) < TOLERANCE, name


@pytest.mark.thorough
def test_resume_in_the_middle_of_a_flight(keras_workers):
    problem = SAME["osgp, star, slowmo, noaverage"]
    whole = keras_workers(2).run("support.trainings.keras:run", problem=problem)
    again = keras_workers(2).run("support.trainings.keras:resumed", problem=problem, stop=7)
    assert same([history[1:] for history in whole], again)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("average", "options"),
    [
        (True, {}),
        (True, {"accumulated": 2}),
        (True, {"unknown": True}),
        (False, {"unknown": True}),
        (False, {"unknown": True, "steps_per_execution": 2}),
    ],
)
def test_fit_equals_the_oracle(keras_workers, average, options):
    """Uneven data, several epochs that end in the middle of a flight; one trace."""
    config = {**OSGP, "average": average}
    lengths, epochs, micro = [6, 10], 3, options.get("accumulated", 1)
    results = keras_workers(2).run(
        "support.jobs.keras_gossip:fit", config=config, lengths=lengths, epochs=epochs, **options
    )

    def gradient(rank, update, z):
        parts = [jobs.gradient(rank, update * micro + k, lengths[rank], z) for k in range(micro)]
        return np.mean(parts, axis=0)

    settings = {**config, "topology": topology(config["topology"], 2)}
    plan = [tuple(length // micro for length in lengths)] * epochs
    joins = [s for s in run_gossip(jobs.start(), gradient, epochs=plan, lr=jobs.RATE, **settings) if s.joined]
    for rank, (weights, steps, traces) in enumerate(results):
        assert steps == joins[-1].step
        assert traces == 2  # the step and the join
        for seen, joined in zip(weights, joins, strict=True):
            np.testing.assert_allclose(seen, joined.z[rank], rtol=0, atol=1e-10)


@pytest.mark.thorough
def test_a_file_saved_in_the_middle_of_a_flight(keras_workers, tmp_path):
    config = {**OSGP, "average": False}
    job = {"config": config, "folder": str(tmp_path), "limit": 240}
    for whole, again in keras_workers(2).run("support.jobs.keras_gossip:saved_in_flight", **job):
        assert same(whole, again)


@pytest.mark.thorough
def test_rank_0s_state_from_the_middle_of_a_flight_starts_all_where_rank_0_was(keras_workers):
    results = keras_workers(2).run("support.jobs.keras_gossip:from_rank_0", config={**OSGP, "tau": 9})
    for weights, mean in results:
        assert np.array_equal(weights, results[0][0])
        np.testing.assert_allclose(mean, results[0][0], rtol=0, atol=1e-14)
