"""The contract of torch.optim: every scheduler."""

import copy

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.models.pytorch import BARE, assert_same, batch, held, net, sgd, train

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 8], 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=6),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=12),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=True),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=5),
}


def test_no_scheduler_is_forgotten():
    assert {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"} <= SCHEDULERS.keys()


def scheduled(name, wrap, rate, on="wrapper", resume=None):
    """Return parameters, rates and momenta of ten steps; resume after the fifth in "fresh" objects or the "same"."""

    def begin():
        model = net()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": copy.deepcopy(rate)}]
        base = torch.optim.SGD(groups, lr=copy.deepcopy(rate), momentum=0.9)
        optimizer = wrap(base, model)
        return model, optimizer, SCHEDULERS[name](optimizer if on == "wrapper" else base)

    model, optimizer, schedule = begin()
    history = []

    def advance(steps):
        for k in steps:
            optimizer.zero_grad()
            loss = model(batch(0, k)).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step(*([1.0 + k // 6] if name == "ReduceLROnPlateau" else []))
            settings = [(float(group["lr"]), group["momentum"]) for group in optimizer.param_groups]
            history.append((settings, held(model)))

    advance(range(5))
    if resume is not None:
        states = copy.deepcopy([part.state_dict() for part in (model, optimizer, schedule)])
        if resume == "fresh":
            model, optimizer, schedule = begin()
        else:
            advance(range(20, 23))  # train on, then go back
            del history[5:]
        for part, state in zip((model, optimizer, schedule), states, strict=True):
            part.load_state_dict(state)
    advance(range(5, 10))
    assert len({settings[0][0] for settings, _ in history}) > 1 or name == "MultiplicativeLR"
    return history


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.slow
@pytest.mark.sample(every=3)
def test_every_scheduler_sets_the_rates_of_the_bare_optimizer_and_goes_on_after_loading(name, rate):
    def wrap(base, model):
        return SlowMo(base, model, BARE)

    bare = scheduled(name, lambda base, model: base, rate)
    assert_same(scheduled(name, wrap, rate), bare)
    assert_same(scheduled(name, wrap, rate, on="base"), bare)
    assert_same(scheduled(name, wrap, rate, resume="fresh"), bare)
    assert_same(scheduled(name, wrap, rate, resume="same"), bare)


def test_a_plateau_of_each_workers_own_loss_warns_once_and_workers_stay_equal(caplog):
    def work(comm):
        model = net()
        optimizer = SlowMo(sgd(model), model, SlowMoConfig(tau=2), comm=comm)
        schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        after = []
        for k in range(8):
            train(model, optimizer, comm.rank, 1, k)
            schedule.step(-float(k) if comm.rank else 1.0)  # rank 0 sees no progress
            if k % 2:
                after.append(held(model))
        return after, optimizer.param_groups[0]["lr"]

    (first, low), (second, high) = ThreadWorld(2).run(work)
    assert low < high
    assert_same(first, second)
    said = [record.getMessage() for record in caplog.records if "learning rates differ" in record.getMessage()]
    assert len(said) == 2, said  # the log of both threads; each worker warns once
    assert "rank 0: 0.0375" in said[0]
    assert "rank 1: 0.1" in said[0]
