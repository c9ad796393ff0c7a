"""Resumes of what the model's watch knows: parameters that nobody has moved, and values from outside."""

import pytest
import torch
from torch import nn

import hvd_slowmo.torch as slowmo
from hvd_slowmo.comm.threads import ThreadWorld

FREEZING = {
    "slowmo": slowmo.SlowMoConfig(tau=2, beta=0.5),
    "local SGD": slowmo.SlowMoConfig.local_sgd(tau=2),
    "gossip": slowmo.SlowMoConfig.sgp(),
    "gossip in blocks": slowmo.SlowMoConfig(tau=3, gossip=slowmo.SGP()),
    "warm-up": slowmo.SlowMoConfig(tau=2, warmup_steps=6),
}


@pytest.mark.parametrize(("kind", "stop"), [("file", 5), ("file", 6), ("state_dict", 7), ("state_dict, model last", 6)])
@pytest.mark.parametrize("name", FREEZING)
@pytest.mark.slow
@pytest.mark.sample(every=3)
def test_frozen_parameters_resume_to_the_bit(name, kind, stop, tmp_path):
    """The mean of three equal values is not the value: only a resume that knows what has moved leaves it alone."""

    def made(comm):
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))  # all workers start from rank 0's values
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, slowmo.SlowMo(inner, model, FREEZING[name], comm=comm)

    def train(comm, model, optimizer, first, last):
        for number in range(first, last):
            model[0].requires_grad_(number < 3)
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * number + comm.rank)  # threads share the global one
            model(torch.randn(4, 3, generator=generator)).square().sum().backward()
            optimizer.step()

    def values(model):
        return {key: value.clone() for key, value in model.state_dict().items()}

    def work(comm):
        model, optimizer = made(comm)
        train(comm, model, optimizer, 0, stop)
        path = tmp_path / "x"
        if kind == "file":
            optimizer.save(path)
        else:
            torch.save([values(model), optimizer.state_dict()], f"{path}{comm.rank}")
        train(comm, model, optimizer, stop, 12)
        optimizer.join()
        other, again = made(comm)
        other[0].requires_grad_(False)
        if kind == "file":
            again.load(path)
        else:
            weights, state = torch.load(f"{path}{comm.rank}", weights_only=True)
            if kind == "state_dict":
                other.load_state_dict(weights)
            again.load_state_dict(state)
            if kind != "state_dict":
                other.load_state_dict(weights)
        train(comm, other, again, stop, 12)
        again.join()
        vectors = optimizer.worker.store.vectors, again.worker.store.vectors
        same = all(torch.equal(a, b) for name in vectors[0] for a, b in zip(*(v[name] for v in vectors), strict=True))
        return values(model), values(other), same

    for whole, resumed, vectors_are_equal in ThreadWorld(3).run(work):
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
        assert vectors_are_equal


def test_a_frozen_parameter_of_another_value_than_the_saved_one_is_averaged(tmp_path):
    def work(comm):
        models = [nn.Linear(1, 1, bias=False) for _ in range(2)]
        inners = [torch.optim.SGD(model.parameters(), lr=1.0) for model in models]
        config = slowmo.SlowMoConfig.local_sgd(tau=1)
        first, second = (slowmo.SlowMo(*each, config, comm=comm) for each in zip(inners, models, strict=True))
        models[0].weight.requires_grad_(False)
        first.step()
        models[1].weight.requires_grad_(False)
        second.load_state_dict(first.state_dict())
        nn.init.constant_(models[1].weight, comm.rank)
        second.step()
        return models[1].weight.item()

    assert ThreadWorld(3).run(work) == [1.0, 1.0, 1.0]


def test_values_from_outside_before_a_save_are_told_after_the_load(tmp_path, caplog):
    def work(comm):
        model = nn.Linear(1, 1, bias=False)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = slowmo.SlowMo(inner, model, slowmo.SlowMoConfig(tau=2, beta=0.5), comm=comm)
        nn.init.constant_(model.weight, 4.0)
        for number in range(4):
            optimizer.zero_grad()
            model.weight.grad = torch.zeros(1, 1)
            optimizer.step()
            if number == 0:
                optimizer.save(tmp_path / "x")
                optimizer.load(tmp_path / "x")
        return model.weight.item()

    assert ThreadWorld(2).run(work) == [4.0, 4.0]
    assert "given other values from outside" in caplog.text
