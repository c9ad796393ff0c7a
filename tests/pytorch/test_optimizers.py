"""The contract of torch.optim: every optimizer. On one worker, and on several with equal data, Local SGD is bitwise
identical to the bare optimizer."""

import copy
import inspect
from typing import get_args

import pytest
import torch
from torch import nn

from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.settings import InnerState
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.models.pytorch import BARE, assert_all_same, assert_same, batch, filled, held, matrices, net

CLASSES = {
    name: item
    for name, item in sorted(vars(torch.optim).items())
    if isinstance(item, type) and issubclass(item, torch.optim.Optimizer) and item is not torch.optim.Optimizer
}
OPTIONS = {
    "lr": torch.tensor(0.01),
    "momentum": 0.9,
    "dampening": 0.1,
    "nesterov": True,
    "weight_decay": 0.1,
    "decoupled_weight_decay": True,
    "amsgrad": True,
    "centered": True,
    "lr_decay": 0.1,
    "maximize": True,
    "foreach": True,
    "fused": True,
    "capturable": True,
    "differentiable": True,
    "line_search_fn": "strong_wolfe",
}


def cases():
    for name, kind in CLASSES.items():
        known = inspect.signature(kind).parameters
        yield name, {}
        for option, value in OPTIONS.items():
            if option in known:
                extra = {"momentum": 0.9} if option in ("nesterov", "dampening") and "momentum" in known else {}
                yield name, {option: value, **extra}


def spell(value):
    return "-".join(value) if isinstance(value, dict) else str(value)


def model_for(name):
    if name == "Muon":
        return matrices()
    if name == "SparseAdam":
        return filled(nn.Sequential(nn.Embedding(10, 4, sparse=True)))
    return net()


def input_for(name, k):
    if name == "SparseAdam":
        return torch.randint(10, (6,), generator=torch.Generator().manual_seed(k))
    return batch(0, k)


def trajectory(name, settings, wrap, model_of=model_for, input_of=input_for):
    """Return the parameters after each of eight steps and the inner state, or the error."""
    model = model_of(name)
    settings = {"lr": 0.01, **copy.deepcopy(settings)}
    history = []
    try:
        base = CLASSES[name](model.parameters(), **settings)
        optimizer = wrap(base, model)
        for k in range(8):

            def closure():
                optimizer.zero_grad()
                loss = model(input_of(name, k)).square().mean()  # noqa: B023 - called within this step only
                loss.backward()
                return loss.detach()

            history += [optimizer.step(closure), *held(model)]
    except (RuntimeError, ValueError, AssertionError, KeyError) as error:
        return type(error), str(error)
    return history, copy.deepcopy(base.state_dict())


@pytest.mark.parametrize(("name", "settings"), list(cases()), ids=spell)
@pytest.mark.slow
@pytest.mark.sample(every=2)
def test_every_optimizer_with_every_option_is_the_bare_one_to_the_bit(name, settings):
    """If torch refuses an option (capturable on the CPU, differentiable with leaves), SlowMo passes its error on."""
    bare = trajectory(name, settings, lambda base, model: base)
    wrapped = trajectory(name, settings, lambda base, model: SlowMo(base, model, BARE, comm=SoloComm()))
    if isinstance(bare[0], type):
        assert settings.keys() & {"capturable", "differentiable"}, bare
    assert_same(wrapped, bare)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # in Adagrad
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_sparse_gradients_are_the_bare_optimizers_to_the_bit(name):
    arguments = (lambda _: model_for("SparseAdam"), lambda _, k: input_for("SparseAdam", k))
    bare = trajectory(name, {}, lambda base, model: base, *arguments)
    assert isinstance(bare[0], list)
    assert_same(trajectory(name, {}, lambda base, model: SlowMo(base, model, BARE), *arguments), bare)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_optimizer_on_workers_with_equal_data_is_the_bare_one_to_the_bit(monkeypatch, name):
    monkeypatch.setattr("hvd_slowmo_torch.optimizer.SlowMo._chunk_bytes", 20)
    bare = trajectory(name, {}, lambda base, model: base)

    def work(comm):
        return trajectory(name, {}, lambda base, model: SlowMo(base, model, BARE, comm=comm))

    for result in ThreadWorld(2).run(work):
        assert_same(result, bare)


NO_AVERAGED_BUFFERS = ("LBFGS", "SparseAdam")  # refused: see test_wrong_arguments in test_slowmo.py


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "buffers"),
    [(n, b) for n in CLASSES for b in get_args(InnerState) if b != "average" or n not in NO_AVERAGED_BUFFERS],
)
@pytest.mark.sample(every=2)
def test_every_optimizer_under_slow_momentum_leaves_equal_workers_and_goes_on_from_its_state(name, buffers):
    def work(comm):
        def begin():
            model = model_for(name)
            base = CLASSES[name](model.parameters(), lr=0.01)
            return model, SlowMo(base, model, SlowMoConfig(tau=2, inner_state=buffers), comm=comm)

        def advance(model, optimizer, steps):
            for k in steps:

                def closure():
                    optimizer.zero_grad()
                    loss = model(input_for(name, 10 * comm.rank + k)).square().mean()  # noqa: B023
                    loss.backward()
                    return loss

                optimizer.step(closure)

        model, optimizer = begin()
        advance(model, optimizer, range(3))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        advance(model, optimizer, range(3, 6))
        other, resumed = begin()
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        advance(other, resumed, range(3, 6))
        assert_same(held(other), held(model))
        assert_same(resumed.state_dict(), optimizer.state_dict())
        return held(model)

    assert_all_same(ThreadWorld(2).run(work))


def test_sparse_gradients_can_not_be_averaged_and_every_worker_says_so():
    def work(comm):
        model = model_for("SparseAdam")
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig.ar_sgd(), comm=comm)
        model(input_for("SparseAdam", comm.rank)).sum().backward()
        optimizer.step()

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert isinstance(result, TypeError)
        assert "has a sparse gradient" in str(result)


def test_the_set_of_classes_is_torchs():
    assert {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop"} <= CLASSES.keys()
    assert {"Rprop", "ASGD", "LBFGS", "SparseAdam"} <= CLASSES.keys()
    assert SlowMo not in CLASSES.values()
