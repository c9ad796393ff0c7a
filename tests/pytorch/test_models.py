"""The contract of torch.optim: compiled, wrapped, copied, split and frozen models."""

import copy
import pickle
from contextlib import nullcontext
from typing import get_args

import pytest
import torch
from torch import nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.settings import InnerState
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.models.pytorch import Two, assert_all_same, assert_same, batch, filled, held, matrices, net, sgd, train


@pytest.mark.slow
def test_a_compiled_model_trains_and_its_optimizer_may_have_either_module():
    def train_compiled(over):
        model = matrices()
        compiled = torch.compile(model, backend="eager")
        optimizer = SlowMo(sgd(model), compiled if over == "compiled" else model, SlowMoConfig(tau=2))
        train(compiled, optimizer, 0, 4)
        return held(model), optimizer.state_dict()

    plain = matrices()
    optimizer = SlowMo(sgd(plain), plain, SlowMoConfig(tau=2))
    train(plain, optimizer, 0, 4)
    (first, state), (second, other) = train_compiled("compiled"), train_compiled("model")
    assert_same(first, held(plain))
    assert_same(second, held(plain))
    assert [entry[0] for entry in state["slowmo"]["parameters"]] == ["_orig_mod.0.weight", "_orig_mod.2.weight"]
    optimizer.load_state_dict(other)
    with pytest.raises(ValueError, match=r"is '_orig_mod.0.weight' .* in this model it is '0.weight'"):
        optimizer.load_state_dict(state)


def test_gradients_of_a_compiled_model_are_averaged():
    models = [matrices() for _ in range(2)]
    compiled = [torch.compile(model, backend="eager") for model in models]
    for model in compiled:
        model(batch(0, 0))  # compiled here: workers as threads would compile at the same time

    def work(comm):
        optimizer = SlowMo(sgd(models[comm.rank]), compiled[comm.rank], SlowMoConfig.ar_sgd(), comm=comm)
        train(compiled[comm.rank], optimizer, comm.rank, 3)
        return held(models[comm.rank])

    assert_all_same(ThreadWorld(2).run(work))


class Wrapped(nn.Module):
    """Wrap the model as DistributedDataParallel does: as a submodule with another name."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


@pytest.mark.parametrize("wrappers", [(), (0,), (1,), (0, 1)], ids=str)
def test_a_wrapper_that_renames_parameters_is_on_all_workers_or_none(wrappers):
    def work(comm):
        model = Wrapped(net()) if comm.rank in wrappers else net()
        optimizer = SlowMo(sgd(model), model, SlowMoConfig(tau=2), comm=comm)
        train(model, optimizer, comm.rank, 2)
        return held(model)

    results = ThreadWorld(2).run(work, return_exceptions=True)
    if len(wrappers) == 1:
        for result in results:
            assert isinstance(result, ValueError)
            assert "rank 1 differs from rank 0: parameters, entry 0: it has " in str(result)
            assert "module.0.weight" in str(result)
    else:
        assert_all_same(results)


@pytest.mark.parametrize("config", [SlowMoConfig(tau=2), SlowMoConfig.ar_sgd()], ids=["local", "all"])
def test_an_optimizer_of_a_submodule_trains_that_and_averages_the_models_statistics(config):
    def work(comm):
        model = filled(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), comm.rank)
        optimizer = SlowMo(sgd(model[2]), model, config, comm=comm)
        start, last = held(model[0]), model[2].weight.detach().clone()
        for k in range(4):
            model.zero_grad()
            model(batch(comm.rank, k)).square().mean().backward()
            foreign = model[0].weight.grad.clone()
            optimizer.step()
            assert torch.equal(foreign, model[0].weight.grad)
        assert_same(held(model[0]), start)
        assert not torch.equal(model[2].weight, last)
        return held(model), foreign, model[1].running_mean.clone()

    (first, a, mean), (second, b, other) = ThreadWorld(2).run(work)
    assert_same(first, second)  # the rest is equal too: all start from rank 0's
    assert not torch.equal(a, b)
    assert torch.equal(mean, other) == (config.tau is not None)


def gan(comm, config, foreign):
    """Train two models with two optimizers; the generator's backward goes through the discriminator."""
    g, d = filled(nn.Linear(2, 4), 1), filled(nn.Linear(4, 1), 2)
    of_g = SlowMo(torch.optim.Adam(g.parameters(), lr=0.01), g, config, comm=comm, name="g")
    of_d = SlowMo(torch.optim.Adam(d.parameters(), lr=0.01), d, config, comm=comm, name="d")
    for k in range(4):
        noise = batch(comm.rank, k, 6, 2)
        of_d.zero_grad()
        (d(g(noise).detach()).sigmoid() - d(batch(comm.rank, k, 6, 4)).sigmoid()).mean().backward()
        of_d.step()
        of_g.zero_grad()
        with foreign(of_d):
            (-d(g(noise)).sigmoid().mean()).backward()
        of_g.step()
    return held(g), held(d)


@pytest.mark.parametrize("config", [SlowMoConfig.ar_sgd(), SlowMoConfig(tau=2, warmup_steps=2)], ids=["all", "warm-up"])
def test_a_gan_of_two_models_puts_the_foreign_backward_under_no_sync(config):
    results = ThreadWorld(2).run(lambda comm: gan(comm, config, SlowMo.no_sync))
    assert_all_same(results)


def test_a_gan_without_no_sync_is_told_about_it():
    for result in ThreadWorld(2).run(
        lambda comm: gan(comm, SlowMoConfig.ar_sgd(), lambda _: nullcontext()), return_exceptions=True
    ):
        assert "those meant for another optimizer, under optimizer.no_sync()" in str(result)


def test_one_backward_averages_the_gradients_of_two_optimizers_over_parts_of_one_model(monkeypatch):
    monkeypatch.setattr("hvd_slowmo_torch.optimizer.SlowMo._chunk_bytes", 20)

    def work(comm):
        model = filled(Two())
        both = [SlowMo(sgd(model.get_submodule(n)), model, SlowMoConfig.ar_sgd(), comm=comm, name=n) for n in "ab"]
        for k in range(3):
            model.zero_grad()
            model(batch(comm.rank, k)).square().mean().backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            for optimizer in both:
                optimizer.step()
        return held(model), gradients

    assert_all_same(ThreadWorld(2).run(work))


@pytest.mark.parametrize("frozen", ["some", "all"])
@pytest.mark.parametrize("chunk_bytes", [20, 2**20])
def test_gradients_of_parameters_unfrozen_later_are_averaged_when_backward_returns(monkeypatch, frozen, chunk_bytes):
    monkeypatch.setattr("hvd_slowmo_torch.optimizer.SlowMo._chunk_bytes", chunk_bytes)

    def work(comm):
        model = filled(Two())
        model.a.requires_grad_(False)
        if frozen == "all":
            model.b.requires_grad_(False)
        optimizer = SlowMo(sgd(model), model, SlowMoConfig.ar_sgd(), comm=comm)
        start = held(model)
        if frozen == "some":
            train(model, optimizer, comm.rank, 2)
        assert_same(held(model.a), start[:2])
        assert not any(p.requires_grad for p in model.a.parameters())
        model.requires_grad_(True)
        model.b.requires_grad_(False)  # so that nothing trained earlier takes part
        optimizer.zero_grad()
        model(batch(comm.rank, 5)).square().mean().backward()
        gradients = [p.grad.clone() for p in model.a.parameters()]
        optimizer.step()
        assert_same(gradients, [p.grad for p in model.a.parameters()])
        model.b.requires_grad_(True)
        train(model, optimizer, comm.rank, 2, 6)
        assert not torch.equal(model.a.weight, start[0])
        return gradients, held(model)

    assert_all_same(ThreadWorld(2).run(work))


def test_a_model_may_be_copied_and_pickled_and_the_copy_is_on_its_own():
    def work(comm):
        model = net()
        optimizer = SlowMo(sgd(model), model, SlowMoConfig.ar_sgd(), comm=comm)
        train(model, optimizer, comm.rank, 1)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), swa_utils.AveragedModel(model).module]
        if comm.rank == 0:  # no exchange: the other worker is not here
            for other in copies:
                assert_same(held(other), held(model))
                other(batch(0, 0)).sum().backward()
        train(model, optimizer, comm.rank, 1, 1)
        return held(model)

    assert_all_same(ThreadWorld(2).run(work))


def checkpointed(comm, reentrant, context):
    """Take two steps with averaged gradients through two activation checkpoints; reentrant=None: without them."""
    model = filled(Two())
    optimizer = SlowMo(sgd(model), model, SlowMoConfig.ar_sgd(), comm=comm)
    for k in range(2):
        optimizer.zero_grad()
        x = batch(comm.rank, k).requires_grad_()
        for part in (model.a, model.b):
            x = part(x) if reentrant is None else checkpoint(part, x, use_reentrant=reentrant)
        with context(optimizer):
            x.square().mean().backward()
        optimizer.step()  # averages gradients that no backward has averaged
    return held(model)


@pytest.mark.parametrize(
    ("reentrant", "context"), [(False, nullcontext), (False, SlowMo.no_sync), (True, SlowMo.no_sync)]
)
def test_averaged_gradients_of_checkpointed_models(reentrant, context):
    plain = ThreadWorld(2).run(lambda comm: checkpointed(comm, None, nullcontext))
    assert_same(ThreadWorld(2).run(lambda comm: checkpointed(comm, reentrant, context)), plain)


def test_reentrant_checkpoints_run_several_backwards_and_need_no_sync():
    for result in ThreadWorld(2).run(lambda comm: checkpointed(comm, True, nullcontext), return_exceptions=True):
        assert "a second backward in one step" in str(result)


@pytest.mark.parametrize("inner_state", get_args(InnerState))
def test_parameters_given_with_their_names(inner_state):
    def work(comm):
        model = filled(Two(), comm.rank)
        base = torch.optim.Adam(model.a.named_parameters(), lr=0.01)
        optimizer = SlowMo(base, model, SlowMoConfig(tau=2, inner_state=inner_state), comm=comm)
        train(model, optimizer, comm.rank, 1)
        optimizer.add_param_group({"params": [(f"b.{name}", p) for name, p in model.b.named_parameters()]})
        train(model, optimizer, comm.rank, 3, 1)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert [group["param_names"] for group in optimizer.param_groups] == [
            ["weight", "bias"],
            ["b.weight", "b.bias"],
        ]
        return held(model)

    assert_all_same(ThreadWorld(2).run(work))
