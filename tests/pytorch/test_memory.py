"""Memory beside the model: that of all tensors that the optimizer keeps, against the formula and its own figure."""

import logging

import pytest
import torch
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.core.start.announcement import size_in_words
from hvd_slowmo.core.start.memory import bytes_beside_model
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.memory import BLOCKING, LATE, SHAPE, TAU, WORKERS


def tensors_in(item):
    """Yield all tensors in an object's containers."""
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, dict):
        for each in item.values():
            yield from tensors_in(each)
    elif isinstance(item, (list, tuple)):
        for each in item:
            yield from tensors_in(each)


@pytest.mark.parametrize("form", BLOCKING)
@pytest.mark.parametrize("late", [None, *LATE])
@pytest.mark.slow
@pytest.mark.sample(every=5)
def test_memory_is_that_of_the_formula_within_two_percent(caplog, form, late):
    settings, vectors = BLOCKING[form]
    settings, vectors = ({**settings, **LATE[late][0]}, vectors + LATE[late][1]) if late else (settings, vectors)
    config = SlowMoConfig(tau=TAU, **settings)
    caplog.set_level(logging.INFO, "hvd_slowmo")

    def work(comm):
        model = nn.Linear(*SHAPE)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, config, comm=comm)
        most = 0
        for _ in range(2 * TAU + 1):
            for p in model.parameters():
                p.grad = torch.full_like(p, comm.rank + 1.0)
            optimizer.step()
            kept = {name: each for name, each in vars(optimizer.worker.store).items() if name != "_staging"}
            most = max(most, sum(x.nbytes for x in tensors_in(kept)))  # _staging: room for messages
        return most

    whole = 4 * (SHAPE[0] * SHAPE[1] + SHAPE[1])
    for found in ThreadWorld(WORKERS).run(work):
        assert found == pytest.approx(vectors * whole, rel=0.02, abs=0.02 * whole)
    bias = 4 * SHAPE[1] if config.bits < 32 else 0  # it travels whole then
    kept = bytes_beside_model(config, whole, whole - bias if config.sliced_vectors else 0, WORKERS)
    assert kept == pytest.approx(vectors * whole, rel=0.02)
    assert f"{size_in_words(kept)} of memory beside the model" in caplog.text
