"""Momentum and rates in the units of both frameworks."""

import numpy as np
import pytest
import torch

from hvd_slowmo.checkpoint import file as safefile
from hvd_slowmo.checkpoint.inner_state import convert_momentum
from hvd_slowmo.errors import CheckpointError
from support.checkpoints import one


def test_momentum_in_the_units_of_both_frameworks():
    b = np.random.default_rng(0).normal(size=50)
    m = convert_momentum("x", b, "velocity", 0.3)
    np.testing.assert_allclose(m, -0.3 * b, rtol=1e-15)
    np.testing.assert_allclose(convert_momentum("x", m, "momentum", 0.3), b, rtol=1e-15)
    assert not convert_momentum("x", b * 0, "momentum", 0.0).any()
    with pytest.raises(CheckpointError, match="at a learning rate of 0"):
        convert_momentum("x", m, "momentum", 0.0)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_rate_that_a_script_has_set_is_saved(tensor, tmp_path):
    def made(rate):
        return one(base=lambda p: torch.optim.SGD(p, lr=torch.tensor(rate) if tensor else rate))[1]

    given, then = (0.1, 0.2) if tensor else (float(np.float32(0.1)), 0.1)
    first = made(0.5)
    safe = tmp_path / "checkpoint"
    first.save(safe)
    facts, arrays, _ = safefile.read(safe)
    arrays["progress/learning_rate"][:] = given  # as Keras has it, or as another PyTorch has that takes no tensor
    safefile.write(safe, facts, arrays)
    optimizer = made(0.5)
    optimizer.load(safe)
    optimizer.save(safe)
    expected = float(np.float32(given)) if tensor else given
    assert safefile.read(safe)[1]["progress/learning_rate"][0] == expected
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(then) if tensor else then
    optimizer.save(safe)
    assert safefile.read(safe)[1]["progress/learning_rate"][0] == (float(np.float32(then)) if tensor else then)
