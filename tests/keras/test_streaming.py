"""Outer steps in fragments, and one step late, under Keras: the reference, joins, resumes, refusals."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.tf import SlowMo, SlowMoConfig
from support.problems import STREAMED, Problem, distance
from support.trainings import keras as keras_training

# Several workers' graphs wait in this process's threads at once; see test_reference.py.
tf.config.threading.set_inter_op_parallelism_threads(16)

SAME = {name: p for name, p in STREAMED.items() if p.same_everywhere and p.config.get("delay", 0) < 2}


def thorough(value):
    """Leave a value to `make test-all`: each takes half a minute to trace."""
    return pytest.param(value, marks=pytest.mark.thorough)


def train(size, problem, chunk_bytes=None, job=keras_training.run, **arguments):
    with keras_training.doubles(chunk_bytes):
        return ThreadWorld(size).run(lambda comm: job(problem, comm=comm, **arguments))


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
@pytest.mark.thorough
def test_threads_equal_the_reference(name):
    problem = SAME[name]
    histories = train(2, problem, chunk_bytes=40)
    assert distance(histories, problem, 40) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", [thorough("three fragments, constant"), "one step late, plain SGD, warm-up"])
def test_uneven_epochs_equal_the_reference(name):
    problem, plan = SAME[name], [(4, 9), (6, 2)]
    histories = train(2, problem, job=keras_training.epochs, plan=plan)
    reference = problem.streamed_reference(2, epochs=plan)[1:]
    for history in histories:
        for mine, first, expected in zip(history, histories[0], reference, strict=True):
            assert mine["step"] == expected.step
            assert np.abs(mine["x"] - expected.x[0]).max() < 1e-12
            assert np.array_equal(mine["x"], first["x"])


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.thorough
def test_a_worker_in_a_join_answers_gradients_and_late_fragments(keras_workers):
    """A worker that trains exchanges gradients before the fragment that is in flight."""
    problem = Problem({"tau": 3, "fragments": 3, "delay": 1, "gradients": "all"})
    plan = [(3, 7), (5, 2)]
    histories = keras_workers(2).run("support.trainings.keras:epochs", problem=problem, plan=plan)
    for history in histories:
        for mine, expected in zip(history, problem.streamed_reference(2, epochs=plan)[1:], strict=True):
            assert np.abs(mine["x"] - expected.x[0]).max() < 1e-12


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("name", ["three fragments, constant", "streaming Local SGD"])
@pytest.mark.parametrize("stop", [6, 7])
def test_a_resume_in_flight_is_bitwise_the_run_without_a_stop(name, stop):
    problem = SAME[name]
    whole, again = train(2, problem), train(2, problem, job=keras_training.resumed, stop=stop)
    for history, expected in zip(again, whole, strict=True):
        assert all(equal(a, b) for a, b in zip(history, expected[1:], strict=True))


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.parametrize("name", SAME)
@pytest.mark.sample("a fragment per step")
def test_workers_equal_the_reference(keras_workers, name):
    histories = keras_workers(2).run("support.trainings.keras:run", problem=SAME[name], chunk_bytes=40)
    assert distance(histories, SAME[name], 40) < 1e-12


@pytest.mark.parametrize(
    ("settings", "longest"),
    [({"delay": 2}, 1), ({"bits": 8, "delay": 3}, 2), ({"fragments": 2, "delay": 3}, 1)],
    ids=str,
)
def test_longer_delays_are_refused(settings, longest):
    with pytest.raises(ValueError, match=f"delay can be {longest} at most"):
        SlowMo(keras.optimizers.SGD(0.1), SlowMoConfig(**settings))


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", ["at an outer step", "in join()"])
@pytest.mark.parametrize(
    "settings", [{"delay": 1}, {"fragments": 2, "delay": 1}, {"fragments": 4, "delay": 2, "bits": 8}], ids=str
)
@pytest.mark.sample(every=5)
def test_averaged_parameters_on_one_worker_is_an_error_on_all(settings, elsewhere):
    def work(comm):
        kernel = keras.Variable(np.arange(12.0).reshape(3, 4), dtype="float32")
        inner = keras.optimizers.SGD(0.125)
        optimizer = SlowMo(inner, SlowMoConfig(tau=4, **settings), comm=keras_training.GraphComm(comm))
        optimizer.broadcast([kernel])
        for _ in range(6 if comm.rank == 0 or elsewhere == "in join()" else 14):
            optimizer.apply([tf.fill([3, 4], 1.0 + comm.rank)], [kernel])
        if comm.rank == 0:
            with optimizer.averaged_parameters():
                return
        optimizer.join([kernel])

    with keras_training.doubles(16):
        errors = ThreadWorld(2).run(work, return_exceptions=True)
    for error in errors:
        assert isinstance(error, ValueError)
        assert f"rank 0 is in averaged_parameters(), rank 1 is {elsewhere}" in str(error)


def test_a_join_of_a_single_worker_applies_what_is_in_flight():
    kernel = keras.Variable(np.ones((3, 4)), dtype="float32")
    optimizer = SlowMo(keras.optimizers.SGD(0.1), SlowMoConfig(tau=2, delay=1))
    optimizer.broadcast([kernel])
    for _ in range(2):
        optimizer.apply([tf.ones((3, 4))], [kernel])
    assert optimizer.worker.variables.now.flight.launched.tolist() == [2]
    optimizer.join([kernel])
    assert optimizer.worker.variables.now.flight.launched.tolist() == [0]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"delay": 1}, {"fragments": 2, "delay": 2, "bits": 8}], ids=str)
def test_a_script_that_mends_its_model_goes_on(settings):
    """Nothing is in flight any more, and the blocks go on as if nothing had been sent."""

    def work(comm):
        kernel = keras.Variable(np.arange(12.0).reshape(3, 4), dtype="float32")
        config = SlowMoConfig(tau=4, **settings)
        optimizer = SlowMo(keras.optimizers.SGD(0.125), config, comm=keras_training.GraphComm(comm))
        optimizer.broadcast([kernel])
        seen = []
        for step in range(12):
            gradient = np.full((3, 4), 1.0 + comm.rank, np.float32)
            if step == 3 and comm.rank == 1:
                gradient[0, 0] = np.nan
            try:
                optimizer.apply([tf.constant(gradient)], [kernel])
            except ValueError:
                kernel.assign(np.nan_to_num(kernel.numpy()))
                now = optimizer.worker.variables.now
                seen.append((int(now.step), now.since.tolist(), now.flight.launched.tolist()))
        optimizer.join([kernel])
        return kernel.numpy(), seen

    with keras_training.doubles(16):
        first, second = ThreadWorld(2).run(work)
    assert np.isfinite(first[0]).all()
    assert np.array_equal(first[0], second[0])
    assert first[1] == second[1]
    assert len(first[1]) == 1
    step, since, launched = first[1][0]
    assert not any(launched)
    if "fragments" not in settings:
        assert (step, since) == (4, [4])


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 1])
def test_an_excluded_worker_returns_to_the_anchors_of_all_fragments(delay):
    """A variable has stretches in two fragments; each keeps the others' values while one is written."""

    def work(comm):
        kernel = keras.Variable(np.arange(12.0).reshape(3, 4), dtype="float32")
        config = SlowMoConfig(tau=4, fragments=2, delay=delay, nonfinite="exclude")
        optimizer = SlowMo(keras.optimizers.SGD(0.125), config, comm=keras_training.GraphComm(comm))
        optimizer.broadcast([kernel])
        for step in range(12):
            gradient = np.full((3, 4), 1.0 + comm.rank, np.float32)
            if step == 4 and comm.rank == 1:
                gradient[0, 0] = np.nan
            optimizer.apply([tf.constant(gradient)], [kernel])
        optimizer.join([kernel])
        return kernel.numpy()

    with keras_training.doubles(16):
        first, second, third = ThreadWorld(3).run(work)
    assert np.isfinite(first).all()
    assert np.array_equal(first, second)
    assert np.array_equal(first, third)
