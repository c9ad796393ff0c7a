"""`slowmo.measure`: steps with and without an exchange, and refusals."""

import time

import pytest
import torch
from torch import nn

import hvd_slowmo.torch as slowmo
from hvd_slowmo.advice.training import Training, load_training
from hvd_slowmo.comm.threads import ThreadWorld
from support.own_time import OwnTime

STEP, EXCHANGE = 0.25, 1.5  # seconds of a step, and of an exchange


@pytest.fixture
def clock(monkeypatch):
    own = OwnTime()
    monkeypatch.setattr("hvd_slowmo.advice.steps.time", own)
    return own


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_steps_of_any_optimizer_are_measured(clock, tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, dtype=torch.float64))
    model[0].bias.requires_grad_(False)
    optimizer = sgd(model)
    with slowmo.measure(optimizer, steps=4) as measured:
        for number in range(8):
            assert measured.done == (number > 4)  # one step starts the clock
            clock.pass_by(10 if number in (0, 2) else STEP, work=0.125)  # data are loaded before, and once within
            optimizer.step()
    found = measured.training()
    assert found == Training(STEP, 6 + 3, 4 * 6 + 8 * 3, 0.125, STEP / 2, steps=4)
    measured.save(tmp_path / "step.json")
    assert load_training(tmp_path / "step.json") == found
    assert not optimizer._optimizer_step_post_hooks


def test_the_end_of_the_context_ends_the_measurement(clock):
    optimizer = sgd(nn.Linear(3, 1))
    with slowmo.measure(optimizer) as measured:
        optimizer.step()
        optimizer.step()
    optimizer.step()
    assert measured.done
    assert measured.training().steps == 1


class Slow:
    """Another Comm whose sums take longer."""

    def __init__(self, comm, clock):
        self._comm, self._clock = comm, clock
        self.rank, self.size, self.ranks, self.node = comm.rank, comm.size, comm.ranks, None

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def wait(self, handle):
        self._clock.pass_by(EXCHANGE / 2)  # for the ledger, and for the parameters
        return self._comm.wait(handle)


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_steps_with_an_exchange_count_apart(clock, warmup_steps):
    def work(comm):
        model = nn.Linear(3, 1)
        config = slowmo.SlowMoConfig(tau=3, warmup_steps=warmup_steps)
        optimizer = slowmo.SlowMo(sgd(model), model, config, comm=Slow(comm, clock))
        measured = slowmo.measure(optimizer, steps=12)
        with pytest.raises(RuntimeError, match=r"no step without an exchange .* Received: 0 steps so far"):
            measured.training()
        while not measured.done:
            clock.pass_by(STEP)
            model.weight.grad, model.bias.grad = torch.ones(1, 3), torch.ones(1)
            optimizer.step()
        return measured.training()

    for found in ThreadWorld(2).run(work):
        assert (found.steps, found.seconds, found.exchange) == (12, STEP, EXCHANGE)


@pytest.mark.parametrize(
    "config",
    [
        slowmo.SlowMoConfig.ar_sgd(),
        slowmo.SlowMoConfig.sgp(),
        slowmo.SlowMoConfig(tau=1),
        slowmo.SlowMoConfig.streaming(4),
    ],
    ids=str,
)
def test_an_optimizer_that_always_exchanges_is_refused(config):
    def work(comm):
        model = nn.Linear(3, 1)
        optimizer = slowmo.SlowMo(sgd(model), model, config, comm=comm)
        with pytest.raises(ValueError, match="every step of this optimizer exchanges something"):
            slowmo.measure(optimizer)
        slowmo.measure(optimizer.inner_optimizer).stop()

    ThreadWorld(2).run(work)


def test_one_worker_exchanges_nothing():
    model = nn.Linear(3, 1)
    optimizer = slowmo.SlowMo(sgd(model), model, slowmo.SlowMoConfig.streaming(2))
    measured = slowmo.measure(optimizer, steps=3)
    for _ in range(4):
        optimizer.step()
    assert measured.training().steps == 3


def test_wrong_arguments_are_refused():
    optimizer = sgd(nn.Linear(3, 1))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer\. Received: Linear"):
        slowmo.measure(nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"`steps` must be a positive integer\. Received: steps=0"):
        slowmo.measure(optimizer, steps=0)
    with pytest.raises(TypeError, match=r"`steps` must be a positive integer\. Received: steps=1\.5"):
        slowmo.measure(optimizer, steps=1.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_on_a_device_are_timed_by_its_stream():
    model = nn.Linear(4096, 4096).cuda()
    optimizer = sgd(model)
    measured = slowmo.measure(optimizer, steps=10)
    x = torch.ones(4096, 4096, device="cuda")
    started = time.perf_counter()
    while not measured.done:
        model(x).sum().backward()
        optimizer.step()
    torch.cuda.synchronize()
    assert 0 < 10 * measured.training().seconds <= time.perf_counter() - started
