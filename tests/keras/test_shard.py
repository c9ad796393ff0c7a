"""Outer state that is divided among the workers, under Keras: the undivided one's results, resumes, real workers."""

import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.comm.threads import ThreadWorld
from support.trainings.keras_few_bits import build, step, trained

# Several workers' graphs wait in this process's threads at once; see test_reference.py.
tf.config.threading.set_inter_op_parallelism_threads(16)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 32, "fragments": 2, "delay": 1, "nesterov": True},
        {"bits": 16, "delay": 2},
        pytest.param({"bits": 32}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_the_result_is_that_of_the_undivided_state(settings):
    """With a join. In 16 bits the step of the anchor is rounded in the place of the mean."""
    divided, whole = (
        ThreadWorld(3).run(lambda comm, s=shard: trained({"shard": s, **settings}, comm)) for shard in (True, False)
    )
    for mine, other in zip(divided, whole, strict=True):
        np.testing.assert_allclose(mine["weight"], other["weight"], atol=1e-6 if settings["bits"] == 32 else 0.01)
        assert np.array_equal(mine["weight"], divided[0]["weight"])


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"bits": 8}, "variables"),
        ({"bits": 32, "delay": 1}, "save"),
        pytest.param({"bits": 8}, "save", marks=pytest.mark.thorough),
        pytest.param({"bits": 32, "delay": 1}, "variables", marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_a_resume_is_bitwise_the_run_without_a_stop(settings, kind, tmp_path):
    def work(comm):
        weights, optimizer = build(comm, shard=True, **settings)
        for k in range(12):
            if k == 5:
                saved = [v.numpy() for v in (*weights, *optimizer.variables)]
                optimizer.save(tmp_path / "x.slowmo")
            step(weights, optimizer, comm.rank, k)
        again, other = build(comm, shard=True, **settings)
        if kind == "save":
            other.load(tmp_path / "x.slowmo")
        else:
            for v, value in zip((*again, *other.variables), saved, strict=True):
                v.assign(value)
            other.broadcast(again)
        for k in range(5, 12):
            step(again, other, comm.rank, k)
        pairs = zip((*weights, *optimizer.variables), (*again, *other.variables), strict=True)
        differing = [a.path for a, b in pairs if not np.array_equal(a.numpy(), b.numpy())]
        return [path for path in differing if path != "sgd/iteration"]  # plain SGD's count is not saved with it

    assert ThreadWorld(2).run(work) == [[], []]


@pytest.mark.workers
def test_real_workers_compute_what_threads_do(keras_workers):
    settings = {"bits": 32, "shard": True, "fragments": 4, "delay": 1}
    found = keras_workers(2).run("support.trainings.keras_few_bits:trained", settings=settings)
    expected = ThreadWorld(2).run(lambda comm: trained(settings, comm))
    for mine, other in zip(found, expected, strict=True):
        assert np.array_equal(mine["weight"], other["weight"])
