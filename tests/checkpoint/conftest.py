"""Fixtures of the checkpoints' tests."""

import pytest

from support.checkpoints import one, train


@pytest.fixture
def checkpoint(tmp_path):
    model, optimizer = one()
    train(model, optimizer, 4)
    optimizer.save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"
