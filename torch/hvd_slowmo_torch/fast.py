"""The outer update in place: half the passes over memory of `hvd_slowmo.outer.outer_update`, which is its oracle."""

from __future__ import annotations

import torch

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.outer import Momentum, outer_update


def outer_update_(
    config: SlowMoConfig, mean: torch.Tensor, anchor: torch.Tensor, v: torch.Tensor | None, m: Momentum
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `outer_update`; the results lie in the memory of mean and v. The anchor is only read."""
    if v is None or m.gain != 1:  # no momentum, or a block without a rate, which keeps v as it was
        return outer_update(config, mean, anchor, v, m)
    delta = anchor - mean
    v.mul_(m.carried)  # w
    if config.alpha != 1:
        mean.add_(delta, alpha=1 - config.alpha)
    if config.nesterov:
        mean.sub_(v.add_(delta), alpha=config.alpha * config.beta)
    else:
        mean.sub_(v, alpha=config.alpha)
        v.add_(delta)
    return mean, v
