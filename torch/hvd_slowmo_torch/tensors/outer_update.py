"""Elementwise work in place: fewer passes over memory than in the core's functions, which are its oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.outer_update import Momentum, outer_update


def outer_update_(
    config: SlowMoConfig, mean: torch.Tensor, anchor: torch.Tensor, v: torch.Tensor | None, m: Momentum
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Do as `outer_update`; the results lie in the memory of anchor and v, and that of mean is used up."""
    if v is None or m.gain != 1:  # no momentum, or a block without a rate, which keeps v as it was
        return outer_update(config, mean, anchor, v, m)
    delta = anchor - mean
    if config.alpha != 1:
        mean.add_(delta, alpha=1 - config.alpha)
    if config.nesterov:
        torch.add(delta, v, alpha=m.carried, out=v)
        torch.sub(mean, v, alpha=config.alpha * config.beta, out=anchor)
    else:
        torch.sub(mean, v, alpha=config.alpha * m.carried, out=anchor)
        torch.add(delta, v, alpha=m.carried, out=v)
    return anchor, v


def divide_(total: torch.Tensor, divisor: float) -> torch.Tensor:
    """Divide in place: the sum is not needed any more."""
    return total.div_(divisor)


def scaled_sum_(x: torch.Tensor, factor: float, y: torch.Tensor, memory: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Do as `scaled_sum`; the result lies in the memory given."""
    return torch.add(y, x, alpha=factor, out=memory())
