"""Schedule-free inner optimizers: train() and eval() switch between the weights to train and those to evaluate."""

import copy
import logging

import pytest
import torch

import hvd_slowmo.torch as slowmo
from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.comm.threads import ThreadWorld
from support.inner_optimizers import ScheduleFree
from support.models.pytorch import BARE, assert_all_same, assert_same, held, net, sgd, train


def make(comm, config=None, **settings):
    model = net()
    inner = ScheduleFree(model.parameters(), lr=0.5, beta=0.1)  # far between the modes: the switch rounds much
    optimizer = slowmo.SlowMo(inner, model, config, comm=comm, **settings)
    optimizer.train()
    return model, optimizer


def test_only_schedule_free_optimizers_have_modes():
    model, optimizer = make(SoloComm(), tau=2)
    assert callable(optimizer.train)
    assert callable(optimizer.eval)
    other = slowmo.SlowMo(sgd(model), model, comm=SoloComm(), tau=2)
    assert not hasattr(other, "train")
    assert not hasattr(other, "eval")
    with pytest.raises(AttributeError, match="'SlowMo' object has no attribute 'train'"):
        other.train()
    with pytest.raises(TypeError, match="can't be pickled or deep-copied"):
        copy.deepcopy(optimizer)


def test_evaluation_between_steps_leaves_the_inner_optimizers_own_values():
    """Bitwise those of the optimizer alone, which rounds when it switches."""
    results = []
    for alone in (False, True):
        model, optimizer = net(), None
        inner = ScheduleFree(model.parameters())
        optimizer = inner if alone else slowmo.SlowMo(inner, model, BARE, comm=SoloComm())
        optimizer.train()
        for k in range(5):
            train(model, optimizer, 0, 2, first=2 * k)
            optimizer.eval()
            results.append(held(model))
            optimizer.train()
        results.append(held(model))
    assert_same(results[:6], results[6:])


@pytest.mark.parametrize("settings", [{}, {"gradients": "all"}, {"inner_state": "average"}])
def test_evaluation_after_a_join_is_neither_progress_nor_a_value_from_outside(settings, caplog):
    def work(comm, evaluates):
        model, optimizer = make(comm, tau=3, beta=0.5, **settings)
        for k in range(3):
            train(model, optimizer, comm.rank, 4, first=4 * k)
            optimizer.join()
            if evaluates:
                before = held(model)
                optimizer.eval()
                assert not all(torch.equal(a, b) for a, b in zip(before, held(model), strict=True))
                optimizer.train()
        return [*held(model), optimizer.worker.store.vectors["v"][0].clone()]

    with caplog.at_level(logging.WARNING, logger="hvd_slowmo"):
        found = ThreadWorld(2).run(lambda comm: work(comm, True))
    assert "from outside" not in caplog.text
    expected = ThreadWorld(2).run(lambda comm: work(comm, False))
    for values, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-6)  # the inner optimizer's rounding


def test_values_that_are_loaded_in_eval_mode_are_values_from_outside(caplog):
    def work(comm):
        model, optimizer = make(comm, tau=2, beta=0.5)
        train(model, optimizer, comm.rank, 4)
        optimizer.join()
        optimizer.eval()
        model.load_state_dict(net(seed=7).state_dict())
        optimizer.train()
        train(model, optimizer, comm.rank, 2, first=4)

    with caplog.at_level(logging.WARNING, logger="hvd_slowmo"):
        ThreadWorld(2).run(work)
    assert "given other values from outside on rank 0, rank 1" in caplog.text


def test_values_that_are_loaded_before_eval_are_noticed_too(caplog):
    def work(comm):
        model, optimizer = make(comm, tau=2, beta=0.5)
        train(model, optimizer, comm.rank, 4)
        optimizer.join()
        model.load_state_dict(net(seed=7).state_dict())
        optimizer.eval()
        optimizer.train()
        train(model, optimizer, comm.rank, 2, first=4)

    with caplog.at_level(logging.WARNING, logger="hvd_slowmo"):
        ThreadWorld(2).run(work)
    assert "given other values from outside on rank 0, rank 1" in caplog.text


def test_steps_and_collectives_of_the_trained_weights_raise_in_eval_mode(tmp_path):
    def work(comm):
        model, optimizer = make(comm, tau=2)
        train(model, optimizer, comm.rank, 3)
        optimizer.save(tmp_path / "job")
        optimizer.eval()
        before = held(model)
        for what in (
            optimizer.step,
            optimizer.join,
            optimizer.restart,
            lambda: slowmo.join(optimizer),
            lambda: optimizer.save(tmp_path / "other"),
            lambda: optimizer.load(tmp_path / "job"),
        ):
            with pytest.raises(RuntimeError, match=r"after eval\(\): .* Call optimizer\.train\(\) first"):
                what()
        assert_same(held(model), before)
        assert optimizer.steps == 3
        optimizer.train()
        train(model, optimizer, comm.rank, 1, first=3)
        optimizer.join()
        return held(model)

    assert_all_same(ThreadWorld(2).run(work))
    assert not (tmp_path / "other").exists()


def test_a_step_before_train_raises_as_the_inner_optimizers_does():
    model = net()
    optimizer = slowmo.SlowMo(ScheduleFree(model.parameters()), model, comm=SoloComm(), tau=2)
    with pytest.raises(RuntimeError, match="not in train mode"):
        train(model, optimizer, 0, 1)
    assert optimizer.steps == 0


def test_a_state_from_eval_mode_resumes_bitwise():
    def work(comm):
        model, optimizer = make(comm, tau=3)
        train(model, optimizer, comm.rank, 4)
        optimizer.eval()
        states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        optimizer.train()
        train(model, optimizer, comm.rank, 4, first=4)

        other = net()
        inner = ScheduleFree(other.parameters(), lr=0.5, beta=0.1)
        resumed = slowmo.SlowMo(inner, other, comm=comm, tau=3, name="resumed")
        other.load_state_dict(states[0])
        resumed.load_state_dict(states[1])
        with pytest.raises(RuntimeError, match=r"after eval\(\)"):
            resumed.step()
        resumed.train()
        train(other, resumed, comm.rank, 4, first=4)
        assert_same(held(other), held(model))

    ThreadWorld(2).run(work)


@pytest.mark.parametrize("joins", [False, True])
def test_the_mean_of_the_weights_to_evaluate(joins):
    """Each worker has its own, after a join too: the inner optimizer's state is its own."""

    def work(comm):
        model, optimizer = make(comm, tau=3)
        train(model, optimizer, comm.rank, 4)
        if joins:
            optimizer.join()
        optimizer.eval()
        own = held(model)
        with optimizer.averaged_parameters():
            with pytest.raises(RuntimeError, match=r"train\(\) within averaged_parameters"):
                optimizer.train()
            mean = held(model)
        assert_same(held(model), own)
        return own, mean

    (first, mean), (second, other) = ThreadWorld(2).run(work)
    assert_same(mean, other)
    assert not torch.equal(first[0], second[0])
    torch.testing.assert_close(mean, [(a + b) / 2 for a, b in zip(first, second, strict=True)])


@pytest.mark.parametrize("delay", [1, 2])
def test_an_exchange_in_flight_is_applied_to_the_weights_that_are_trained(delay):
    """By averaged_parameters(), which may be called with the weights to evaluate."""

    def work(comm, evaluates):
        model, optimizer = make(comm, tau=3, beta=0.5, delay=delay)
        train(model, optimizer, comm.rank, 5 + delay)
        assert optimizer.worker.progress.flight.launched.any()
        if evaluates:
            optimizer.eval()
        with optimizer.averaged_parameters():
            pass
        if evaluates:
            optimizer.train()
        return held(model)

    found, expected = (ThreadWorld(2).run(lambda comm, e=e: work(comm, e)) for e in (True, False))
    torch.testing.assert_close(found, expected)
