"""The PyTorch adapter equals the reference: random settings on threads, the list of problems on Horovod workers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_slowmo.comm.threads import ThreadWorld
from support.problems import NESTEROV, PROBLEMS, Problem, distance
from support.sample import examples, some
from support.trainings.pytorch import resumed, run, same

TOLERANCE = 1e-12  # float64, values of size 1


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.sample(every=3)
def test_threads_equal_the_reference(name, size):
    problem = PROBLEMS[name]
    histories = ThreadWorld(size).run(lambda comm: run(problem, comm))
    assert distance(histories, problem) < TOLERANCE


bases = st.sampled_from(
    [("sgd", {}), ("sgd", {"momentum": 0.9, "weight_decay": 0.01}), ("sgd", NESTEROV), ("adam", {}), ("adamw", {})]
)


@st.composite
def problems(draw):
    base, options = draw(bases)
    config = {
        "tau": draw(st.integers(1, 6)),
        "alpha": draw(st.sampled_from([0.5, 1.0, 1.3])),
        "beta": draw(st.sampled_from([0.3, 0.6, 0.9])),
        "nesterov": draw(st.booleans()),
        "scale_by_lr": draw(st.booleans()),
        "inner_state": draw(st.sampled_from(["maintain", "reset", "average"])),
        "gradients": draw(st.sampled_from(["local", "local", "all"])),
        "warmup_steps": draw(st.integers(0, 4)),
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
@examples(60)
@given(problem=problems(), size=st.integers(1, 5), chunk_bytes=st.sampled_from([8, 24, 40, None]))
def test_any_settings_equal_the_reference(problem, size, chunk_bytes):
    histories = ThreadWorld(size).run(lambda comm: run(problem, comm, chunk_bytes))
    # Adam divides by the root of its second moment, so the trajectory amplifies rounding errors of 1e-16.
    assert distance(histories, problem) < 1e-10
    for step in (s.step for s in problem.reference(size) if s.outer):
        for history in histories[1:]:
            assert same(history[step], histories[0][step])


@pytest.mark.workers
@pytest.mark.parametrize(
    "size",
    [
        3,
        *(pytest.param(n, marks=pytest.mark.thorough) for n in (2, 4, 8)),
    ],
)
@pytest.mark.slow
def test_workers_equal_the_reference(workers, size):
    for name, problem in some(PROBLEMS):
        histories = workers(size).run("support.trainings.pytorch:run", problem=problem, chunk_bytes=40)
        assert distance(histories, problem) < TOLERANCE, name
        for step in (s.step for s in problem.reference(size) if s.outer):
            for history in histories[1:]:
                assert same(history[step], histories[0][step]), (name, step)


@pytest.mark.workers
@pytest.mark.slow
def test_resume_at_every_step_is_bitwise_the_run_without_a_stop(workers):
    problem = PROBLEMS["slowmo over Nesterov SGD, reset"]
    whole = workers(2).run("support.trainings.pytorch:run", problem=problem)
    for stop in range(problem.steps + 1):
        again = workers(2).run("support.trainings.pytorch:resumed", problem=problem, stop=stop)
        assert same([history[1:] for history in whole], again), stop


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.slow
@pytest.mark.sample(every=2)
def test_resume_in_the_middle_of_a_block(name):
    problem = PROBLEMS[name]
    whole = ThreadWorld(2).run(lambda comm: run(problem, comm))
    for stop in (2, 5, 7):
        again = ThreadWorld(2).run(lambda comm, stop=stop: resumed(problem, stop, comm))
        assert same([history[1:] for history in whole], again), stop


def test_the_first_block_is_exactly_tau_steps():
    problem = Problem({"tau": 5, "alpha": 1.0, "beta": 0.0}, steps=6)
    histories = ThreadWorld(2).run(lambda comm: run(problem, comm))
    equal = [np.array_equal(a["x"], b["x"]) for a, b in zip(*histories, strict=True)]
    assert equal == [True, False, False, False, False, True, False]
