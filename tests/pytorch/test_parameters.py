"""The contract of torch.optim: types and shapes of parameters."""

import pytest
import torch
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.models.pytorch import assert_all_same, batch, filled, held, sgd


class Zoo(nn.Module):
    """Parameters of all floating-point types and layouts, with gradients that depend on rank and step."""

    def __init__(self, plain):
        super().__init__()
        values = {
            "scalar": torch.randn(()),
            "half": torch.randn(3, 2).half(),
            "empty": torch.empty(0, 3),
            "transposed": torch.randn(5, 3).t(),
            "double": torch.randn(4, 3).double().t(),
            "channels_last": torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
            "brain": torch.randn(2, 3).bfloat16().t(),
            "strided": torch.randn(4, 6)[:, ::2],
            "narrowed": torch.randn(5, 7).narrow(1, 2, 3),
        }
        for name, value in values.items():
            self.register_parameter(f"a_{name}", nn.Parameter(value.contiguous() if plain else value))

    def forward(self, rank, k):
        return sum((p.double() * batch(rank, 10 * k + i, *p.shape)).sum() for i, p in enumerate(self.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("chunk_bytes", [8, 44])
@pytest.mark.parametrize(
    "config",
    [SlowMoConfig(tau=2), SlowMoConfig(tau=2, inner_state="average", warmup_steps=1), SlowMoConfig.ar_sgd()],
    ids=["maintain", "average", "all"],
)
def test_types_and_layouts_in_one_model_train_as_contiguous_ones_do(monkeypatch, config, chunk_bytes):
    def work(comm, plain):
        model = filled(Zoo(plain), comm.rank)
        strides = [p.stride() for p in model.parameters()]
        optimizer = SlowMo(sgd(model, weight_decay=0.1), model, config, comm=comm)
        for k in range(5):
            optimizer.zero_grad()
            model(comm.rank, k).backward()
            optimizer.step()
        state = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
        optimizer.join()
        assert plain or not all(p.is_contiguous() for p in model.parameters())
        assert strides == [p.stride() for p in model.parameters()]
        return held(model), state

    plain = ThreadWorld(3).run(lambda comm: work(comm, True))
    monkeypatch.setattr("hvd_slowmo_torch.optimizer.SlowMo._chunk_bytes", chunk_bytes)
    results = ThreadWorld(3).run(lambda comm: work(comm, False))
    assert_all_same([parameters for parameters, _ in results])
    for (parameters, state), (expected, expected_state) in zip(results, plain, strict=True):
        for a, b in zip(parameters + state, expected + expected_state, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


def test_workers_of_different_memory_formats_agree():
    def work(comm):
        model = filled(Zoo(plain=comm.rank == 0), comm.rank)
        optimizer = SlowMo(sgd(model), model, SlowMoConfig(tau=2), comm=comm)
        for k in range(2):
            optimizer.zero_grad()
            model(comm.rank, k).backward()
            optimizer.step()
        return held(model)

    assert_all_same(ThreadWorld(2).run(work))


def holding(value):
    model = nn.Module()
    model.weight = nn.Linear(2, 2).weight
    model.odd = nn.Parameter(value)
    return model


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda: holding(torch.zeros(2, device="meta")), ValueError, "odd is on the meta device"),
        (lambda: holding(torch.zeros(1).expand(3)), RuntimeError, "single memory location"),
        (
            lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)),
            ValueError,
            "1.weight of a lazy module has no shape yet",
        ),
        (lambda: nn.ParameterList([nn.Parameter(torch.empty(0))]), ValueError, "has no parameter with an element"),
    ],
    ids=["meta", "expanded", "lazy", "empty"],
)
def test_parameters_that_can_not_be_trained_are_refused_at_construction_by_all(model, error, words):
    def work(comm):
        mine = model()
        SlowMo(torch.optim.SGD(mine.parameters(), lr=0.1), mine, SlowMoConfig(tau=2), comm=comm)

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert isinstance(result, error)
        assert words in str(result)
