"""Uneven data: join, on threads with random lengths of epochs, on Horovod workers, and against the reference."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from reference.join import run_epochs
from support.problems import NESTEROV, Problem
from support.sample import examples
from support.trainings.pytorch import build, epochs, same

SETTINGS = {
    "slowmo": Problem({"tau": 4, "alpha": 0.9}, options={"momentum": 0.9}),
    "slowmo, reset, decaying rates": Problem({"tau": 4, "inner_state": "reset"}, options=NESTEROV, schedule="decay"),
    "slowmo, average": Problem({"tau": 3, "inner_state": "average"}, options={"momentum": 0.9}),
    "nesterov, two groups": Problem({"tau": 5, "nesterov": True}, schedule="restarts", groups=(0, 0, 1, 1)),
    "local_sgd": Problem({"tau": 4, "alpha": 1.0, "beta": 0.0}),
    "warm-up": Problem({"tau": 4, "warmup_steps": 6}, options={"momentum": 0.9}),
    "ar_sgd": Problem({"tau": None, "alpha": 1.0, "beta": 0.0, "gradients": "all"}, options=NESTEROV),
    "averaged gradients and outer steps": Problem({"tau": 3, "gradients": "all"}, options=NESTEROV, schedule="decay"),
}
UNEVEN = [(6, 3, 9), (4, 4, 4), (0, 2, 13), (1, 0, 1), (0, 0, 0), (7, 8, 2)]


def compare(problem, plan, histories):
    expected = run_epochs(
        problem.start(),
        problem.gradient,
        epochs=plan,
        workers=len(plan[0]),
        lr=lambda worker, step, group: problem.rate(step, group),
        base=problem.base,
        base_options=problem.options,
        groups=np.repeat(problem.groups, [6, 4, 1, 4]),
        **problem.config,
    )
    before = 0
    for number, epoch in enumerate(expected):
        for rank, history in enumerate(histories):
            seen = history[number]
            np.testing.assert_allclose(seen["x"], epoch.x[rank], rtol=0, atol=1e-12, err_msg=f"{number} {rank}")
            assert seen["step"] == epoch.step
            assert seen["behind"] == epoch.step - (before + plan[number][rank])
            for vector in ("anchor", "v"):
                if vector in seen:
                    np.testing.assert_allclose(seen[vector], getattr(epoch, vector), rtol=0, atol=1e-12)
            assert same({k: seen[k] for k in ("x", "anchor", "v") if k in seen},
                        {k: histories[0][number][k] for k in ("x", "anchor", "v") if k in seen})  # fmt: skip
        before = epoch.step


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.slow
def test_uneven_epochs_equal_the_reference(name):
    problem = SETTINGS[name]
    histories = ThreadWorld(3).run(lambda comm: epochs(problem, UNEVEN, comm))
    compare(problem, UNEVEN, histories)


@pytest.mark.slow
@examples(40)
@given(
    name=st.sampled_from(sorted(SETTINGS)),
    plan=st.integers(2, 4).flatmap(lambda m: st.lists(st.tuples(*[st.integers(0, 9)] * m), min_size=1, max_size=5)),
)
def test_any_lengths_of_epochs_equal_the_reference(name, plan):
    problem = SETTINGS[name]
    histories = ThreadWorld(len(plan[0])).run(lambda comm: epochs(problem, plan, comm))
    compare(problem, plan, histories)


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.thorough)])
def test_uneven_epochs_on_horovod_workers(workers, size):
    plan = [(*lengths, 5)[:size] for lengths in UNEVEN]
    for problem in SETTINGS.values():
        compare(problem, plan, workers(size).run("support.trainings.pytorch:epochs", problem=problem, plan=plan))


@pytest.mark.slow
@pytest.mark.workers
def test_the_users_own_collectives_after_a_join_are_left_alone(workers):
    assert workers(3).run("support.jobs.pytorch:own_collectives_after_join") == [3.0, 3.0, 3.0]


def test_where_the_epoch_is_a_multiple_of_tau_join_changes_nothing_to_the_bit():
    problem = Problem({"tau": 4}, options={"momentum": 0.9})

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        for step in range(8):
            model.set_gradient(problem.gradient(comm.rank, step, model.flat()))
            optimizer.step()
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        assert optimizer.join().behind == 0
        assert same((model.state_dict(), optimizer.state_dict()), before)

    ThreadWorld(3).run(work)


def test_a_common_state_after_a_join_serves_every_rank():
    problem = SETTINGS["slowmo"]

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        for step in range(5 + comm.rank):
            model.set_gradient(problem.gradient(comm.rank, step, model.flat()))
            optimizer.step()
        assert not optimizer.state_dict()["slowmo"]["common"]
        optimizer.join()
        state = optimizer.state_dict()["slowmo"]
        assert state["common"]
        return state["progress"]

    first, second = ThreadWorld(2).run(work)
    assert first == second


def test_who_leaves_for_good_is_known_at_the_next_join():
    problem = SETTINGS["slowmo"]

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        for step in range(3 + comm.rank):
            model.set_gradient(problem.gradient(comm.rank, step, model.flat()))
            optimizer.step()
        joined = optimizer.join(leaving=comm.rank == 2)
        if comm.rank == 2:
            return joined
        for _ in range(2):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"ranks \[2\] have left"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"ranks \[2\] have left"):
            optimizer.join()
        return joined

    assert ThreadWorld(3).run(work) == [(2, (2,)), (1, (2,)), (0, (2,))]


def test_alone_join_does_nothing():
    model = nn.Linear(2, 1)
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=3))
    model(torch.ones(1, 2)).backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    assert optimizer.join() == (0, ())
    assert same(model.state_dict(), before)


def test_averaged_parameters_while_another_worker_joins_is_an_error_everywhere():
    problem = SETTINGS["slowmo"]

    def work(comm):
        _, optimizer = build(problem, comm, comm.rank)
        if comm.rank == 1:
            optimizer.join()
        else:
            with optimizer.averaged_parameters():
                pass

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert "rank 0 is in averaged_parameters(), rank 1 is in join()" in str(result)


@pytest.mark.parametrize("gradients", ["local", "all"])
def test_overflowed_steps_and_a_join(gradients):
    """With a scaler and uneven data, scales, steps and parameters are equal where they must be, and no worker hangs."""
    config = SlowMoConfig(tau=3, gradients=gradients)

    def work(comm):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = SlowMo(torch.optim.Adam(model.parameters(), lr=0.01), model, config, comm=comm)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for epoch in range(2):
            for k in range(4 + 3 * ((comm.rank + epoch) % 3)):
                x = torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * comm.rank + 10 * epoch + k))
                optimizer.zero_grad()
                bad = float("inf") if (comm.rank, k) in ((0, 1), (2, 4)) else 1.0
                scaler.scale(model(x).square().mean() * bad).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.join(scaler=scaler)
        return optimizer.steps, scaler.get_scale(), model.weight.detach().clone()

    results = ThreadWorld(3).run(work)
    assert len({steps for steps, _, _ in results}) == 1
    assert all(torch.equal(weight, results[0][2]) for _, _, weight in results)
    if gradients == "all":
        assert len({scale for _, scale, _ in results}) == 1


def four_steps(comm, proto, ranks, broken=None):
    """Run a block of four steps on some ranks of a world; one of them may fail in its third step."""
    rank, model = ranks[comm.rank], copy.deepcopy(proto)
    config = SlowMoConfig(tau=4, nonfinite="exclude")
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SlowMo(base, model, config, comm=comm)
    for k in range(4):
        optimizer.zero_grad()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * rank + k))
        model(x).square().sum().backward()
        if rank == broken and k == 2:
            with torch.no_grad():
                model[0].weight[0, 0] = float("nan")
                model[1].running_mean[0] = float("nan")
        optimizer.step()
    return model.state_dict(), optimizer.state_dict()


def test_a_worker_that_is_not_finite_is_left_out_and_takes_the_others_result(caplog):
    proto = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    results = ThreadWorld(3).run(lambda comm: four_steps(comm, proto, (0, 1, 2), broken=1))
    others = ThreadWorld(2).run(lambda comm: four_steps(comm, proto, (0, 2)))
    for key, value in others[0][0].items():
        for model, _ in results:
            assert torch.equal(model[key], value), key
    assert [state["slowmo"]["progress"]["excluded"] for _, state in results] == [0, 1, 0]
    assert results[1][1]["state"] == {}  # its inner state starts again
    assert results[0][1]["state"] != {}
    assert "on rank 1 after step 4; left out of the average" in caplog.text


def test_nobody_finite_raises_on_every_worker():
    def work(comm):
        model = nn.Linear(2, 1)
        config = SlowMoConfig(tau=2, nonfinite="exclude")
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, config, comm=comm)
        with torch.no_grad():
            model.weight[0, 0] = float("nan")
        for _ in range(2):
            optimizer.step()

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert "not finite (NaN or infinity) on rank 0, rank 1" in str(result)
