"""Outer steps in fragments and late ones, on PyTorch: the reference, resumes in flight, joins, refusals."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.problems import ADAM, LOCAL_SGD, NESTEROV, STREAMED, Problem, distance
from support.sample import examples, some
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
        "shard": False if momentum is LOCAL_SGD else draw(st.booleans()),
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
@examples(80)
@given(problem=problems(), size=st.integers(1, 4), chunk_bytes=st.sampled_from([8, 24, 40, None]))
def test_any_settings_equal_the_reference(problem, size, chunk_bytes):
    histories = ThreadWorld(size).run(lambda comm: run(problem, comm, chunk_bytes))
    # Adam divides by the root of its second moment, so the trajectory amplifies rounding errors of 1e-16.
    assert distance(histories, problem, chunk_bytes) < 1e-10
    for step in range(problem.steps + 1):
        for name in ("anchor", "v"):
            assert all(same(history[step].get(name), histories[0][step].get(name)) for history in histories)


@pytest.mark.slow
@examples(60)
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
@pytest.mark.slow
@pytest.mark.sample(every=5)
def test_a_resume_in_flight_is_bitwise_the_run_without_a_stop(name, stop):
    problem = STREAMED[name]
    whole = ThreadWorld(2).run(lambda comm: run(problem, comm))
    again = ThreadWorld(2).run(lambda comm: resumed(problem, stop, comm))
    for history, expected in zip(again, whole, strict=True):
        assert same(history, expected[1:])


@pytest.mark.workers
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.thorough)])
@pytest.mark.slow
def test_workers_equal_the_reference(workers, size):
    for name, problem in some(STREAMED):
        histories = workers(size).run("support.trainings.pytorch:run", problem=problem, chunk_bytes=40)
        assert distance(histories, problem, 40) < TOLERANCE, name


SETTINGS = [{"fragments": 2}, {"delay": 1}, {"fragments": 4, "delay": 2}, {"fragments": 2, "delay": 4}]


def small(comm, seed=0, **settings):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, SlowMo(inner, model, SlowMoConfig(**{"tau": 4, **settings}), comm=comm)


def train(model, optimizer, rank, steps):
    for k in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(100 * rank + k))
        model(x).square().mean().backward()
        optimizer.step()


def values(model):
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_parameters_and_statistics_are_equal_after_a_join(settings):
    def work(comm):
        model, optimizer = small(comm, **settings)
        train(model, optimizer, comm.rank, range(5 + 2 * comm.rank))
        optimizer.join()
        return values(model), optimizer.state_dict()["slowmo"]["common"]

    (first, common), *others = ThreadWorld(3).run(work)
    assert common
    assert all(same(other, (first, True)) for other in others)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_join_after_a_join_changes_nothing(settings):
    def work(comm):
        model, optimizer = small(comm, **settings)
        train(model, optimizer, comm.rank, range(6))
        optimizer.join()
        before = values(model), copy.deepcopy(optimizer.state_dict())
        optimizer.join()
        return same(before, (values(model), optimizer.state_dict()))

    assert ThreadWorld(2).run(work) == [True, True]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_averaged_parameters_are_the_mean_of_what_the_workers_hold_once_nothing_is_in_flight(settings):
    def work(comm):
        model, optimizer = small(comm, **settings)
        train(model, optimizer, comm.rank, range(5))
        with optimizer.averaged_parameters():
            mean = values(model)
        own = values(model)
        assert not any(optimizer.worker.progress.flight.launched)
        return mean, own

    (mean, a), (again, b) = ThreadWorld(2).run(work)
    assert same(mean, again)
    assert not same(a, b)
    for name, value in mean.items():
        torch.testing.assert_close(value, ((a[name] + b[name]) / 2).to(value.dtype), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("at", range(2, 8))
def test_a_value_that_is_not_finite_ends_every_worker_at_one_step(settings, at):
    """Whatever is in flight: the fragment that was sent broken raises when it is applied."""

    def work(comm):
        model, optimizer = small(comm, **settings)
        try:
            for k in range(16):
                train(model, optimizer, comm.rank, range(k, k + 1))
                if k == at and comm.rank == 1:
                    with torch.no_grad():
                        model[0].weight[0, 0] = float("nan")
        except ValueError as error:
            return k, str(error)
        return None

    results = ThreadWorld(3).run(work)
    assert len({step for step, _ in results}) == 1
    assert all("not finite (NaN or infinity) on rank 1" in words for _, words in results)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_excluded_worker_goes_on_with_the_others_values(settings):
    def work(comm):
        model, optimizer = small(comm, nonfinite="exclude", **settings)
        for k in range(16):
            train(model, optimizer, comm.rank, range(k, k + 1))
            if k == 5 and comm.rank == 1:
                with torch.no_grad():
                    model[0].weight[0, 0] = float("nan")
        optimizer.join()
        return values(model), int(optimizer.worker.progress.excluded)

    results = ThreadWorld(3).run(work)
    assert all(same(model, results[0][0]) for model, _ in results)
    assert all(bool(value.isfinite().all()) for value in results[0][0].values())
    assert [excluded > 0 for _, excluded in results] == [False, True, False]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_worker_that_fails_in_flight_ends_the_others(settings):
    def work(comm):
        model, optimizer = small(comm, **settings)
        train(model, optimizer, comm.rank, range(5))
        if comm.rank == 1:
            raise RuntimeError("out of memory")
        train(model, optimizer, comm.rank, range(5, 16))

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert "out of memory" in str(result)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_state_loaded_in_flight_drops_what_is_in_flight(settings):
    """On every worker a state of before takes the place of a training that goes on, and repeats it bitwise."""

    def work(comm):
        model, optimizer = small(comm, **settings)
        train(model, optimizer, comm.rank, range(6))
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, comm.rank, range(6, 11))
        first = values(model)
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        train(model, optimizer, comm.rank, range(6, 11))
        return same(first, values(model))

    assert ThreadWorld(2).run(work) == [True, True]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_restart_in_flight_begins_at_rank_0s_values(settings):
    def work(comm):
        model, optimizer = small(comm, **settings)
        train(model, optimizer, comm.rank, range(5))
        own = values(model)
        optimizer.restart()
        begun = values(model)
        train(model, optimizer, comm.rank, range(5, 14))
        optimizer.join()
        return own, begun, values(model)

    (own, begun, end), (_, other, other_end) = ThreadWorld(2).run(work)
    for name in (name for name in own if "num_batches" not in name):
        assert torch.equal(own[name], begun[name])
        assert torch.equal(begun[name], other[name])
        assert torch.equal(end[name], other_end[name])


def test_a_join_of_a_single_worker_applies_what_is_in_flight():
    model = torch.nn.Linear(3, 1)
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=2, delay=1))
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert optimizer.worker.progress.flight.launched.tolist() == [2]
    optimizer.join()
    assert optimizer.worker.progress.flight.launched.tolist() == [0]
    assert optimizer.state_dict()["slowmo"]["common"]


def test_a_saved_state_in_flight_is_not_common_and_fits_its_rank_alone():
    def work(comm):
        model, optimizer = small(comm, delay=1)
        train(model, optimizer, comm.rank, range(4))  # sent and not applied: `since` is 0
        return optimizer.state_dict()["slowmo"]

    states = ThreadWorld(2).run(work)
    assert not any(state["common"] for state in states)


@pytest.mark.parametrize("settings", [{"fragments": 2}, {"delay": 1}], ids=str)
def test_parameters_are_not_added_in_flight(settings):
    def work(comm):
        model, optimizer = small(comm, **settings)
        train(model, optimizer, comm.rank, range(4))
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert isinstance(result, ValueError)
        assert "can't be added with fragments > 1" in str(result)


def test_half_precision_keeps_local_progress_in_its_own_type():
    def work(comm):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).to(torch.bfloat16)
        inner = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer = SlowMo(inner, model, SlowMoConfig(tau=2, fragments=2, delay=1), comm=comm)
        for k in range(9):
            optimizer.zero_grad()
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(10 * comm.rank + k)).to(torch.bfloat16)
            model(x).square().mean().backward()
            optimizer.step()
        optimizer.join()
        return values(model), optimizer.state_dict()["slowmo"]["vectors"]["anchor"]

    (a, anchor), (b, other) = ThreadWorld(2).run(work)
    assert same(a, b)
    assert same(anchor, other)
    assert all(value.dtype == torch.bfloat16 for value in a.values())


def test_frozen_parameters_stay_bitwise_as_they_are():
    """They are equal everywhere, and a mean would be equal to them up to rounding only."""

    def work(comm):
        model, optimizer = small(comm, fragments=3, delay=1)
        train(model, optimizer, comm.rank, range(5))
        optimizer.join()
        model[0].requires_grad_(False)
        before = values(model[0])
        train(model, optimizer, comm.rank, range(5, 14))
        return same(before, values(model[0]))

    assert ThreadWorld(3).run(work) == [True] * 3


def test_values_from_outside_are_no_progress_of_any_fragment():
    def work(comm):
        model = nn.Linear(4, 4, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = SlowMo(
            torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=4, fragments=4, delay=1), comm=comm
        )
        nn.init.ones_(model.weight)  # loaded weights
        for _ in range(13):
            optimizer.zero_grad()
            (model.weight.sum() * 0).backward()
            optimizer.step()
        optimizer.join()
        return model.weight.detach().clone()

    assert all(torch.equal(weight, torch.ones(4, 4)) for weight in ThreadWorld(2).run(work))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_model_of_another_form_is_refused_on_every_worker(settings):
    def work(comm):
        model, optimizer = small(comm, **settings)
        train(model, optimizer, comm.rank, range(5))
        if comm.rank == 1:
            model.double()
        for _ in range(5, 12):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert isinstance(result, ValueError)
        assert "is not the one that the optimizer was constructed with" in str(result)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_worker_that_is_excluded_from_a_join_takes_the_others_mean(settings):
    def work(comm):
        model, optimizer = small(comm, nonfinite="exclude", **settings)
        train(model, optimizer, comm.rank, range(7))
        if comm.rank == 1:
            with torch.no_grad():
                model[2].weight[0, 0] = float("nan")
        optimizer.join()
        return values(model)

    first, *others = ThreadWorld(3).run(work)
    assert all(bool(value.isfinite().all()) for value in first.values())
    assert all(same(first, other) for other in others)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_value_that_is_not_finite_raises_in_a_join_too(settings):
    """The others have launched more by the time they learn of it."""

    def work(comm):
        model, optimizer = small(comm, **settings)
        train(model, optimizer, comm.rank, range(5))
        if comm.rank == 1:
            with torch.no_grad():
                model[0].weight[0, 0] = float("nan")
            train(model, optimizer, comm.rank, range(5, 16))
        optimizer.join()

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert isinstance(result, ValueError)
        assert "not finite (NaN or infinity) on rank 1" in str(result)
