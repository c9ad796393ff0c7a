"""What SlowMo refuses when it is constructed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_torch.inner_optimizer import fresh


def check_types(base: Any, model: Any, config: Any, name: Any, parameter_map: Any) -> None:
    """Refuse arguments of SlowMo that are something else altogether."""
    if not isinstance(base, Optimizer):
        raise TypeError(f"`base_optimizer` must be a torch.optim.Optimizer. Received: {type(base).__name__}")
    if hasattr(base, "averaged_parameters"):  # SlowMo itself imports this module
        raise TypeError("`base_optimizer` is a SlowMo optimizer already. Wrap the optimizer that it wraps.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module. Received: {type(model).__name__}")
    if not isinstance(config, SlowMoConfig):
        raise TypeError(f"`config` must be a SlowMoConfig. Received: {type(config).__name__}")
    if not isinstance(name, str) or not name:
        raise TypeError(f"`name` must be a string that is not empty. Received: {name!r}")
    if parameter_map is not None and not isinstance(parameter_map, ParameterMap):
        raise TypeError(f"`parameter_map` must be a ParameterMap. Received: {type(parameter_map).__name__}")


def check_base(base: Optimizer, config: SlowMoConfig) -> None:
    """Refuse a base optimizer that can't do what the settings ask for, now rather than in the middle of training."""
    for number, group in enumerate(base.param_groups):
        if "lr" not in group:
            raise ValueError(f"parameter group {number} of the base optimizer has no learning rate 'lr'.")
    if config.tau is not None and (config.buffers == "reset" or config.nonfinite == "exclude"):
        fresh(base)
    if (config.gradients != "local" or config.warmup_steps) and isinstance(base, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates its closure as often as its own losses tell it, on every worker differently: "
            "gradients can't be averaged with it. Use gradients='local' without warm-up."
        )
