"""The contract of torch.optim: learning rates as tensors, groups added later, accumulation."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.models.pytorch import Two, assert_all_same, assert_same, batch, filled, held, matrices, net, sgd, train


@pytest.mark.parametrize("config", [SlowMoConfig(tau=2), SlowMoConfig(tau=3, warmup_steps=2), SlowMoConfig.ar_sgd()])
def test_rates_that_are_tensors_and_filled_in_place_train_as_numbers_do(config):
    def work(comm, rate):
        model = net()
        base = sgd(model, lr=rate if comm.rank == 0 else 7 * rate)  # rank 0's is used
        optimizer = SlowMo(base, model, config, comm=comm)
        place = optimizer.param_groups[0]["lr"]
        train(model, optimizer, comm.rank, 7, schedule=lr_scheduler.StepLR(optimizer, 2, 0.5))
        if isinstance(place, torch.Tensor):
            assert optimizer.param_groups[0]["lr"] is place
        progress = optimizer.state_dict()["slowmo"]["progress"]
        return held(model), progress["gamma"][0], progress["rate_sums"][0], float(place)

    rate = torch.tensor(0.125)
    tensors = ThreadWorld(2).run(lambda comm: work(comm, rate.clone()))
    numbers = ThreadWorld(2).run(lambda comm: work(comm, 0.125))
    for with_tensor, with_number in zip(tensors, numbers, strict=True):
        assert_same(with_tensor[:3], with_number[:3])
    assert tensors[0][3] == tensors[1][3] == 0.125 / 8


@pytest.mark.parametrize("config", [SlowMoConfig(tau=4), SlowMoConfig.ar_sgd()], ids=["local", "all"])
def test_a_join_gives_rates_that_are_tensors_back(config):
    def work(comm):
        model = net()
        optimizer = SlowMo(sgd(model, lr=torch.tensor(0.1)), model, config, comm=comm)
        place = optimizer.param_groups[0]["lr"]
        train(model, optimizer, comm.rank, 2 + 3 * comm.rank)
        optimizer.join()
        assert optimizer.param_groups[0]["lr"] is place
        return held(model), place, optimizer.steps

    assert_all_same(ThreadWorld(2).run(work))


@pytest.mark.parametrize("later", ["number", "tensor"])
@pytest.mark.parametrize("config", [SlowMoConfig(tau=4), SlowMoConfig.ar_sgd()], ids=["local", "all"])
def test_a_group_added_within_a_block_under_a_scheduler(monkeypatch, config, later):
    monkeypatch.setattr("hvd_slowmo_torch.optimizer.SlowMo._chunk_bytes", 20)

    def work(comm):
        model = filled(Two(), comm.rank)
        base = torch.optim.SGD(model.a.parameters(), lr=torch.tensor(1 / 64), momentum=0.9)
        optimizer = SlowMo(base, model, config, comm=comm)
        schedule = lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
        train(model, optimizer, comm.rank, 2)
        rate = 1 / 32 if later == "number" else torch.tensor(1 / 32)
        optimizer.add_param_group({"params": model.b.parameters(), "lr": rate, "momentum": 0.0})
        schedule.base_lrs.append(1 / 32)
        schedule.lr_lambdas.append(lambda k: 0.5**k)
        for k in range(2, 8):
            train(model, optimizer, comm.rank, 1, k)
            if k == 3:
                gamma = optimizer.state_dict()["slowmo"]["progress"]["gamma"][0]
            schedule.step()
        return held(model), gamma, float(optimizer.param_groups[1]["lr"])

    results = ThreadWorld(2).run(work)
    assert_all_same(results)
    # For the block's first two steps the new group counts as it was when it was added.
    assert results[0][1] == ([1 / 64, (3 / 32 + 1 / 64) / 4] if config.tau else [0.0, 0.0])
    assert results[0][2] == 1 / 32 / 2**6


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (lambda model: {"params": model.a.parameters()}, "some parameters appear in more than one parameter group"),
        (lambda model: {"params": [nn.Parameter(torch.ones(2))]}, "is not a parameter of the model"),
        (lambda model: {"params": [nn.Parameter(torch.ones(2))], "lr": "fast"}, "is not a parameter of the model"),
        (lambda model: {"params": model.b.weight}, r"parameters, entry|entries where"),
    ],
)
def test_a_wrong_group_on_one_worker_is_refused_by_all_and_training_goes_on(group, words):
    def work(comm):
        model = filled(Two())
        optimizer = SlowMo(torch.optim.SGD(model.a.parameters(), lr=0.1), model, SlowMoConfig(tau=2), comm=comm)
        with pytest.raises(ValueError, match=words):
            optimizer.add_param_group(group(model) if comm.rank else {"params": model.b.parameters()})
        assert len(optimizer.param_groups) == 1
        train(model, optimizer, comm.rank, 2)
        optimizer.add_param_group({"params": model.b.parameters()})
        train(model, optimizer, comm.rank, 2, 2)
        return held(model)

    assert_all_same(ThreadWorld(2).run(work))


def test_news_of_workers_that_come_outlives_a_group_that_is_added():
    """One worker has heard; the exchange after the addition tells the others."""

    def work(comm):
        model = filled(Two())
        optimizer = SlowMo(torch.optim.SGD(model.a.parameters(), lr=0.1), model, SlowMoConfig(tau=2), comm=comm)
        train(model, optimizer, comm.rank, 1)
        if comm.rank == 1:
            optimizer.worker.assembly.runtime.regrouping.heard.set(1)
        optimizer.add_param_group({"params": model.b.parameters()})
        train(model, optimizer, comm.rank, 1, 1)
        return bool(optimizer.worker.assembly.runtime.regrouping.agreed.get())

    assert ThreadWorld(2).run(work) == [True, True]


def test_accumulated_gradients_are_one_step():
    def work(comm):
        model, together = matrices(), matrices()
        optimizer = SlowMo(sgd(model), model, SlowMoConfig(tau=2), comm=comm)
        other = SlowMo(sgd(together), together, SlowMoConfig(tau=2), comm=comm, name="together")
        for k in range(4):
            optimizer.zero_grad()
            for part in range(3):
                with optimizer.no_sync():  # changes nothing where gradients are local
                    model(batch(comm.rank, 3 * k + part)).square().mean().backward()
            optimizer.step()
            other.zero_grad()
            sum(together(batch(comm.rank, 3 * k + part)).square().mean() for part in range(3)).backward()
            other.step()
        assert optimizer.steps == other.steps == 4
        for a, b in zip(held(model), held(together), strict=True):
            torch.testing.assert_close(a, b)
        return held(model)

    assert_all_same(ThreadWorld(2).run(work))


def test_an_accumulated_gradient_that_the_last_backward_does_not_touch_is_averaged(monkeypatch):
    monkeypatch.setattr("hvd_slowmo_torch.optimizer.SlowMo._chunk_bytes", 20)

    def work(comm):
        model = filled(Two())
        optimizer = SlowMo(sgd(model), model, SlowMoConfig.ar_sgd(), comm=comm)
        with optimizer.no_sync():
            model(batch(comm.rank, 0)).square().mean().backward()
        model.b(batch(comm.rank, 1)).square().mean().backward()
        return [p.grad for p in model.parameters()]

    results = ThreadWorld(3).run(work)
    model = filled(Two())
    sum((model(batch(r, 0)).square().mean() + model.b(batch(r, 1)).square().mean()) / 3 for r in range(3)).backward()
    assert_all_same(results)
    for mine, p in zip(results[0], model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad)
