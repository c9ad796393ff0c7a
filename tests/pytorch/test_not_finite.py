"""A worker with a NaN or an infinity, wherever it is: named on all ranks, or left out, and nobody else gets it."""

import pytest
import torch
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig

SETTINGS = [{"bits": 8}, {"shard": True}, {"delay": 1}, {}]


def trained(work):
    return ThreadWorld(3).run(work, return_exceptions=True)


def broken(tensors):
    return sum(int((~tensor.isfinite()).sum()) for tensor in tensors)


def values(optimizer):
    """Return the parameters and the inner state."""
    held = [x for state in optimizer.inner_optimizer.state.values() for x in state.values()]
    return [p for group in optimizer.param_groups for p in group["params"]] + [x for x in held if x.is_floating_point()]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("place", [0, 300, 700])
@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.slow
def test_it_is_found_in_every_chunk_of_a_fragment(settings, place, joins, monkeypatch):
    """Of ten chunks per fragment, whose copies take turns in two places of memory."""
    monkeypatch.setattr(SlowMo, "_chunk_bytes", 160)

    def work(comm):
        torch.manual_seed(0)
        model = nn.Linear(40, 20, bias=False)
        config = SlowMoConfig(tau=4, fragments=2, **settings)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, config, comm=comm)
        for k in range(12):
            if k == 5 and comm.rank == 1:
                with torch.no_grad():
                    model.weight.view(-1)[place] = float("nan")
                if joins:
                    break
            model.weight.grad = torch.full_like(model.weight, comm.rank + 1.0)
            optimizer.step()
        optimizer.join()

    for error in trained(work):
        assert isinstance(error, ValueError)
        assert "not finite (NaN or infinity) on rank 1" in str(error)


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("nonfinite", ["raise", "exclude"])
def test_inner_state_that_is_averaged_counts(fragments, delay, nonfinite):
    """An infinite second moment of Adam stops the parameters, which stay finite."""

    def work(comm):
        torch.manual_seed(0)
        model = nn.Linear(8, 4)
        config = SlowMoConfig(
            tau=2, fragments=fragments, delay=delay, nonfinite=nonfinite, inner_state="average", beta=0.5
        )
        optimizer = SlowMo(torch.optim.Adam(model.parameters(), lr=0.01), model, config, comm=comm)
        for k in range(8):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            if k == 4 and comm.rank == 1:
                optimizer.inner_optimizer.state[model.weight]["exp_avg_sq"][0, 0] = float("inf")
            optimizer.step()
            if comm.rank != 1:
                assert not broken(values(optimizer))
        optimizer.join()
        return broken(values(optimizer))

    results = trained(work)
    if nonfinite == "raise":
        assert all("averaged inner state are not finite (NaN or infinity) on rank 1" in str(r) for r in results)
    else:
        assert results == [0, 0, 0]


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("joins_at", [None, 3])
def test_an_infinite_gradient_does_not_spread_by_the_momentum(delay, joins_at):
    """The worker gets finite parameters with the fragment that finds it, before that with which momentum travels."""

    def work(comm):
        torch.manual_seed(0)
        model = nn.Linear(8, 4)
        config = SlowMoConfig(tau=2, fragments=2, delay=delay, nonfinite="exclude", inner_state="average")
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), model, config, comm=comm)
        for k in range(8):
            if comm.rank == 1 and k == joins_at:
                break
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(7 * k + comm.rank))
            if k == 2 and comm.rank == 1:
                model.weight.grad[0, 0] = model.weight.grad[-1, -1] = float("inf")
            optimizer.step()
            assert comm.rank == 1 or not broken(values(optimizer))
        optimizer.join()
        return broken(values(optimizer)), int(optimizer.worker.progress.excluded) > 0

    assert trained(work) == [(0, False), (0, True), (0, False)]
