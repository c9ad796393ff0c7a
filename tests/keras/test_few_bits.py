"""Outer steps in few bits under Keras: the reference bitwise, PyTorch's results, joins, resumes and bytes."""

import numpy as np
import pytest
import tensorflow as tf
from pytorch import test_few_bits as torch_tests

from hvd_slowmo.comm.threads import ThreadWorld
from reference.few_bits import mean_of_differences
from support.trainings.keras_few_bits import SHAPE, build, step, trained

# Several workers' graphs wait in this process's threads at once; see test_reference.py.
tf.config.threading.set_inter_op_parallelism_threads(16)

pytestmark = pytest.mark.slow


def vector(optimizer, name):
    return optimizer.worker.variables.vectors[name][0].numpy().copy()


def owed_slice(optimizer):
    return optimizer.worker.variables.slices["slice_residual"][0].numpy().copy()


@pytest.mark.parametrize(
    ("bits", "size"),
    [(4, 2), *(pytest.param(bits, size, marks=pytest.mark.thorough) for bits in (16, 8, 4) for size in (1, 3, 5))],
)
def test_an_outer_step_equals_the_reference_bitwise(bits, size):
    """tau = 1 and no momentum: the new anchor is the old one minus Delta."""

    def work(comm):
        (weight, bias), optimizer = build(comm, tau=1, beta=0.0, bits=bits)
        seen = []
        for k in range(3):
            before = vector(optimizer, "anchor"), vector(optimizer, "residual"), owed_slice(optimizer)
            gradient = np.random.default_rng([comm.rank, k]).normal(size=SHAPE).astype(np.float32)
            sent = weight.numpy() - np.float32(0.125) * gradient
            optimizer.apply([tf.constant(gradient), tf.ones(5)], [weight, bias])
            after = vector(optimizer, "anchor"), vector(optimizer, "residual"), owed_slice(optimizer)
            assert np.array_equal(weight.numpy().reshape(-1), after[0])
            seen.append((before, sent.reshape(-1), after))
        return seen

    for moment in zip(*ThreadWorld(size).run(work), strict=True):
        anchor = moment[0][0][0]
        sent, owed, slices = zip(*((x, before[1], before[2]) for before, x, _ in moment), strict=True)
        delta, owed, rests = mean_of_differences(anchor, sent, owed, slices, [1.0] * size, bits)
        for rank, (_, _, (new, e, s)) in enumerate(moment):
            assert np.array_equal(new, anchor - delta)
            assert np.array_equal(e, owed[rank])
            assert np.array_equal(s, rests[rank])


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 16},
        {"bits": 8, "fragments": 4, "delay": 2},
        {"bits": 8, "delay": 1},
        {"bits": 4, "delay": 2},
    ],
    ids=str,
)
def test_the_result_is_that_of_pytorch(settings):
    mine = ThreadWorld(3).run(lambda comm: trained(settings, comm))
    theirs = ThreadWorld(3).run(lambda comm: torch_tests.trained(settings, comm))
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a["weight"], b["weight"], atol=1e-5)
        np.testing.assert_allclose(a["bias"], b["bias"], atol=1e-5)
        assert np.array_equal(a["weight"], mine[0]["weight"])


@pytest.mark.parametrize(
    ("settings", "stop", "kind"),
    [
        pytest.param({"fragments": 4, "delay": 2}, 6, "variables", marks=pytest.mark.thorough),
        pytest.param({"fragments": 4, "delay": 2}, 5, "save", marks=pytest.mark.thorough),
        ({}, 5, "variables"),
        pytest.param({}, 6, "save", marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_a_resume_is_bitwise_the_run_without_a_stop(settings, stop, kind, tmp_path):
    def work(comm):
        weights, optimizer = build(comm, **settings)
        optimizer.build(weights)
        for k in range(12):
            if k == stop:
                saved = [v.numpy() for v in (*weights, *optimizer.variables)]
                optimizer.save(tmp_path / "x.slowmo")
            step(weights, optimizer, comm.rank, k)
        again, other = build(comm, **settings)
        if kind == "save":
            other.load(tmp_path / "x.slowmo")
        else:
            for v, value in zip((*again, *other.variables), saved, strict=True):
                v.assign(value)
            other.broadcast(again)
        for k in range(stop, 12):
            step(again, other, comm.rank, k)
        pairs = zip((*weights, *optimizer.variables), (*again, *other.variables), strict=True)
        differing = [a.path for a, b in pairs if not np.array_equal(a.numpy(), b.numpy())]
        return [path for path in differing if path != "sgd/iteration"]  # plain SGD's count is not saved with it

    assert ThreadWorld(2).run(work) == [[], []]


@pytest.mark.workers
@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"fragments": 4, "delay": 2, "bits": 4}, marks=pytest.mark.thorough)],
    ids=str,
)
def test_real_workers_compute_what_threads_do(keras_workers, settings):
    found = keras_workers(2).run("support.trainings.keras_few_bits:trained", settings=settings)
    expected = ThreadWorld(2).run(lambda comm: trained(settings, comm))
    for mine, other in zip(found, expected, strict=True):
        assert np.array_equal(mine["weight"], other["weight"])
