"""Jobs for Horovod workers (see ../pool.py): gossip under the PyTorch adapter."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from hvd_slowmo.torch import SlowMo
from support.problems import config_of


def bytes_per_step(config: dict[str, Any], steps: int) -> list[int]:
    """Return the bytes that each step hands to Horovod, for a model of 1,000 float32 elements."""
    model = nn.Linear(1000, 1, bias=False)
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, config_of(config))
    counts = [optimizer.bytes_sent]
    for _ in range(steps):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        counts.append(optimizer.bytes_sent)
    optimizer.join()  # no worker ends while another still waits
    return [after - before for before, after in pairwise(counts)]
