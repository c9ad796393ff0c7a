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
        pytest.param({"bits": 32, "fragments": 2, "delay": 1, "nesterov": True}, marks=pytest.mark.thorough),
        pytest.param({"bits": 16, "delay": 2}, marks=pytest.mark.thorough),
        {"bits": 32},
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


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [{"bits": 32, "fragments": 2, "delay": 1}, {"bits": 32}],
    ids=str,
)
def test_the_workers_measure_their_slices(settings):
    """Together these are the whole; what was measured in flight comes through the trace."""

    def work(comm, shard):
        weights, optimizer = build(comm, metrics=True, shard=shard, **settings)
        apply = tf.function(lambda gradients: optimizer.apply(gradients, weights)) if shard else None
        seen = []
        for k in range(12):
            step(weights, optimizer, comm.rank, k, apply)
            seen.append(optimizer.metrics())
        return seen

    divided, whole = (ThreadWorld(2).run(lambda comm, s=shard: work(comm, s)) for shard in (True, False))
    measured = 0
    for *parts, all_of_it in zip(*divided, whole[0], strict=True):
        assert (all_of_it is None) == (parts[0] is None)
        if all_of_it is not None:
            measured += all_of_it.v_norm > 0
            assert sum(part.delta_norm**2 for part in parts) == pytest.approx(all_of_it.delta_norm**2, rel=1e-5)
            assert sum(part.v_norm**2 for part in parts) == pytest.approx(all_of_it.v_norm**2, rel=1e-5)
            assert all(part.divergence > 0 for part in parts)
    assert measured


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"bits": 8}, "variables"),
        pytest.param({"bits": 32, "delay": 1}, "save", marks=pytest.mark.thorough),
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


@pytest.mark.thorough
@pytest.mark.workers
def test_real_workers_compute_what_threads_do(keras_workers):
    settings = {"bits": 32, "shard": True, "fragments": 4, "delay": 1}
    found = keras_workers(2).run("support.trainings.keras_few_bits:trained", settings=settings)
    expected = ThreadWorld(2).run(lambda comm: trained(settings, comm))
    for mine, other in zip(found, expected, strict=True):
        assert np.array_equal(mine["weight"], other["weight"])


def states(settings, size):
    """Return each rank's variables after a few steps."""

    def work(comm):
        weights, optimizer = build(comm, **settings)
        for k in range(3):
            step(weights, optimizer, comm.rank, k)
        return [v.numpy() for v in (*weights, *optimizer.variables)]

    return ThreadWorld(size).run(work)


def starting(settings, ranks, given):
    """Let these ranks begin with these states, and return every rank's error and whether its variables are as given."""

    def work(comm):
        weights, optimizer = build(comm, start=False, **settings)
        optimizer.build(weights)
        variables = [*weights, *optimizer.variables]
        if comm.rank in ranks:
            for v, value in zip(variables, given[comm.rank], strict=True):
                v.assign(value)
        before = [v.numpy() for v in variables]
        with pytest.raises(ValueError, match="each rank has its own") as raised:
            optimizer.broadcast(weights)
        kept = all(np.array_equal(v.numpy(), value) for v, value in zip(variables, before, strict=True))
        return str(raised.value), kept

    return ThreadWorld(2).run(work)


@pytest.mark.parametrize(
    "settings", [pytest.param({"bits": 8}, marks=pytest.mark.thorough), {"bits": 32, "shard": True}], ids=str
)
def test_another_ranks_slices_are_refused_before_anything_changes(settings):
    saved = states(settings, 2)
    for text, kept in starting(settings, (0, 1), [saved[0], saved[0]]):
        assert "the state on rank 1 is that of rank 0, and with few bits or shard=True each rank has its own" in text
        assert kept
    for text, kept in starting(settings, (0,), saved):
        assert "rank 0 alone has loaded a state" in text
        assert kept


def test_a_state_that_was_loaded_is_not_saved_before_the_start(tmp_path):
    """The workers' slices can't be gathered yet: zeros would stand in their place."""
    settings = {"bits": 32, "shard": True}
    path = tmp_path / "x.slowmo"

    def work(comm):
        weights, optimizer = build(comm, **settings)
        for k in range(3):
            step(weights, optimizer, comm.rank, k)
        optimizer.save(path, weights)
        again, other = build(comm, start=False, **settings)
        other.build(again)
        other.load(path, again)
        with pytest.raises(ValueError, match="have not been brought to one start"):
            other.save(tmp_path / "y.slowmo", again)

    ThreadWorld(2).run(work)
    assert not (tmp_path / "y.slowmo").exists()
