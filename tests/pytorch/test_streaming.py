"""Outer steps in fragments and late ones, on PyTorch: the reference, resumes in flight, joins, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_slowmo.comm.threads import ThreadWorld
from support.problems import ADAM, LOCAL_SGD, NESTEROV, STREAMED, Problem, distance
from support.trainings.pytorch import epochs, resumed, run, same

TOLERANCE = 1e-12  # float64, values of size 1


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("size", [1, 3])
def test_threads_equal_the_reference(name, size):
    problem = STREAMED[name]
    histories = ThreadWorld(size).run(lambda comm: run(problem, comm))
    assert distance(histories, problem) < TOLERANCE


@st.composite
def problems(draw):
    tau = draw(st.integers(1, 6))
    momentum = draw(st.sampled_from([{}, {}, LOCAL_SGD, {"alpha": 0.7, "beta": 0.9, "nesterov": True}]))
    base, options = draw(st.sampled_from([("sgd", {}), ("sgd", NESTEROV), ("adam", ADAM)]))
    config = {
        "tau": tau,
        "fragments": draw(st.sampled_from(sorted({1, min(3, tau), tau}))),
        "delay": draw(st.sampled_from(sorted({0, 1, min(2, tau), tau}))),
        "scale_by_lr": True if momentum is LOCAL_SGD else draw(st.booleans()),
        "gradients": draw(st.sampled_from(["local", "local", "all"])),
        "warmup_steps": draw(st.integers(0, 4)),
        **momentum,
    }
    return Problem(
        config,
        base,
        options,
        schedule=draw(st.sampled_from(["constant", "decay", "steps", "restarts", "zero"])),
        groups=draw(st.sampled_from([(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 1, 1)])),
        steps=16,
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True)
@given(problem=problems(), size=st.integers(1, 4), chunk_bytes=st.sampled_from([8, 24, 40, None]))
def test_any_settings_equal_the_reference(problem, size, chunk_bytes):
    histories = ThreadWorld(size).run(lambda comm: run(problem, comm, chunk_bytes))
    # Adam divides by the root of its second moment, so the trajectory amplifies rounding errors of 1e-16.
    assert distance(histories, problem, chunk_bytes) < 1e-10
    for step in range(problem.steps + 1):
        for name in ("anchor", "v"):
            assert all(same(history[step].get(name), histories[0][step].get(name)) for history in histories)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    problem=problems(),
    plan=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3).map(tuple), min_size=1, max_size=3),
)
def test_uneven_epochs_equal_the_reference(problem, plan):
    histories = ThreadWorld(3).run(lambda comm: epochs(problem, plan, comm))
    reference = problem.streamed_reference(3, epochs=plan)[1:]
    for history in histories:
        for mine, expected in zip(history, reference, strict=True):
            assert mine["step"] == expected.step
            assert np.abs(mine["x"] - expected.x[0]).max() < 1e-10
            assert same(mine["x"], histories[0][reference.index(expected)]["x"])


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("stop", [5, 6, 7, 8])
def test_a_resume_in_flight_is_bitwise_the_run_without_a_stop(name, stop):
    problem = STREAMED[name]
    whole = ThreadWorld(2).run(lambda comm: run(problem, comm))
    again = ThreadWorld(2).run(lambda comm: resumed(problem, stop, comm))
    for history, expected in zip(again, whole, strict=True):
        assert same(history, expected[1:])


@pytest.mark.workers
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_equal_the_reference(workers, size):
    for name, problem in STREAMED.items():
        histories = workers(size).run("support.trainings.pytorch:run", problem=problem, chunk_bytes=40)
        assert distance(histories, problem, 40) < TOLERANCE, name
