"""Two optimizers in one training, as in every GAN: their exchanges never meet each other's, and none is waited for."""

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

import hvd_slowmo.torch as slowmo
from hvd_slowmo.comm.naming import distinct_name
from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo_torch.tensors.streams import caller_context
from support.jobs import several

LENGTHS = [(5, 2), (2, 7), (0, 3)]
CONFIGS = [
    {"tau": 3},
    {"tau": 2, "warmup_steps": 3},
    {"tau": None, "alpha": 1.0, "beta": 0.0, "gradients": "all"},
    {"tau": 4, "gossip": slowmo.SGP(overlap=True)},
]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.slow
def test_one_join_answers_the_exchanges_of_all(config, lengths):
    """Each optimizer's result is the one that it has in a training of its own."""

    def work(comm):
        other = others.member(comm.rank)
        try:
            return several.train(config, lengths[comm.rank], comms=(comm, other))
        finally:
            others.end(comm.rank, "ended")

    others = ThreadWorld(2)
    together = ThreadWorld(2).run(work)
    for number in range(2):
        alone = ThreadWorld(2).run(lambda comm, n=number: several.alone(config, lengths[comm.rank], comm, n))
        for (found, behind), (expected, expected_behind) in zip(
            (each[number] for each in together), alone, strict=True
        ):
            assert torch.equal(found, expected)
            assert behind == expected_behind


def test_a_discriminator_that_each_iteration_leaves_frozen_is_joined():
    """As in pix2pix, with 2 and 5 iterations; the workers' weights are their steps."""

    def work(comm):
        d, g = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
        inner = [torch.optim.SGD(model.parameters(), lr=1.0) for model in (d, g)]
        comms = comm, others.member(comm.rank)
        try:
            both = [
                slowmo.SlowMo(each, model, tau=100, comm=own, name=name)
                for each, model, own, name in zip(inner, (d, g), comms, "dg", strict=True)
            ]
            with torch.no_grad():
                d.weight.zero_()
            both[0].restart()
            for _ in range((2, 5)[comm.rank]):
                for optimizer, model in zip(both, (d, g), strict=True):
                    d.requires_grad_(model is d)
                    optimizer.zero_grad()
                    (-(comm.rank + 1) * model.weight.sum()).backward()
                    optimizer.step()
            slowmo.join(*both)
        finally:
            others.end(comm.rank, "ended")
        return d.weight.item(), g.weight.item()

    others = ThreadWorld(2)
    first, second = ThreadWorld(2).run(work)
    assert first == second
    assert first[0] == pytest.approx((2 * 2 + 5 * 10) / 7)


def test_an_error_in_one_of_them_is_raised():
    optimizers = [several.optimizer({"tau": 2}, None, seed) for seed in range(2)]
    with optimizers[1].averaged_parameters(), pytest.raises(RuntimeError, match="within averaged_parameters"):
        slowmo.join(*optimizers)


def test_nonsense_is_refused():
    one = several.optimizer({"tau": 2}, None, 0)
    with pytest.raises(ValueError, match="Received: 0 of them"):
        slowmo.join()
    with pytest.raises(ValueError, match="different optimizers"):
        slowmo.join(one, one)
    with pytest.raises(TypeError, match="Received: Adam"):
        slowmo.join(one, torch.optim.Adam(one.worker.model.parameters()))


def test_buffers_of_two_optimizers_are_refused():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1))
    inner = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    both = [slowmo.SlowMo(each, model, tau=2) for each in inner]
    with pytest.raises(ValueError, match=r"average the same buffers.*statistics=\{\"\*\": False\}"):
        slowmo.join(*both)
    slowmo.join(both[0], slowmo.SlowMo(inner[1], model, tau=2, statistics={"*": False}))


def test_a_name_is_given_once():
    def work(comm):
        names = [several.optimizer({"tau": 2}, comm, seed).worker.comm.name for seed in range(3)]
        return [*names, several.optimizer({"tau": 2}, comm, 3, name="d").worker.comm.name]

    assert ThreadWorld(2).run(work) == [["slowmo", "slowmo.1", "slowmo.2", "d"]] * 2


def test_names_are_compared():
    def work(comm):
        return several.optimizer({"tau": 2}, comm, 0, name="da"[comm.rank])

    for error in ThreadWorld(2).run(work, return_exceptions=True):
        assert isinstance(error, ValueError)
        assert "optimizers of one name were constructed: it has 'a' where 'd' is expected" in str(error)


@pytest.mark.slow
@pytest.mark.workers
def test_joins_on_workers_in_any_order(workers):
    """Two of the same shapes and without names, which join in another order on each worker."""
    for lengths in LENGTHS:
        apart, results = [], workers(2).run("support.jobs.several:crossed", config={"tau": 3}, lengths=lengths)
        for number in range(2):
            (first, _), (second, _) = (each[number] for each in results)
            assert torch.equal(first, second)
            apart.append(first)
        assert not torch.equal(*apart)


class Cuda:
    """Stands for torch.cuda: a device and a current stream per thread, as CUDA has them."""

    def __init__(self):
        self.threads = threading.local()
        self.entered = []

    def current_device(self):
        return getattr(self.threads, "device", 0)

    def current_stream(self, device):
        return getattr(self.threads, "streams", {}).get(device.index, f"default of {device.index}")

    @contextmanager
    def stream(self, stream):
        self.entered.append((threading.get_ident(), stream))
        yield

    @contextmanager
    def device(self, number):
        self.entered.append((threading.get_ident(), number))
        yield


def test_the_threads_of_a_join_take_the_callers_device_and_stream(monkeypatch):
    """PyTorch begins a thread on device 0 and its default stream."""
    cuda, ran, both = Cuda(), [], threading.Barrier(2)
    cuda.threads.device, cuda.threads.streams = 1, {1: "side"}
    optimizers = [several.optimizer({"tau": 2}, None, seed) for seed in range(2)]
    for optimizer in optimizers:
        optimizer.join = lambda leaving: ran.append((threading.get_ident(), list(cuda.entered))) or both.wait()
        monkeypatch.setattr(
            optimizer.worker, "caller_context", lambda: caller_context([torch.device("cpu"), torch.device("cuda", 1)])
        )
    monkeypatch.setattr(torch, "cuda", cuda)
    slowmo.join(*optimizers)
    assert len(ran) == 2
    for thread, entered in ran:
        assert [what for where, what in entered if where == thread] == ["side", 1]


def test_a_model_without_cuda_needs_no_context():
    with several.optimizer({"tau": 2}, None, 0).worker.caller_context():
        pass


@dataclass
class Equal(SoloComm):
    """Workers of a class with __eq__, which has no hash."""

    number: int = 0


def test_workers_without_a_hash_have_names_of_their_own():
    first, second = Equal(), Equal()
    names = [distinct_name(workers, "slowmo") for workers in (first, first, second)]
    assert names == ["slowmo", "slowmo.1", "slowmo"]
