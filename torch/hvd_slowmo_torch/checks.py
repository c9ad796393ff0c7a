"""Checks of the constructor's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_torch.inner_optimizer import fresh
from hvd_slowmo_torch.worker import Settings


def check_types(inner: Any, model: Any, settings: Settings) -> None:
    """Refuse arguments of the wrong type.

    Raises:
        TypeError: naming the argument and the type received.
    """
    config, name, parameter_map = settings.config, settings.name, settings.parameter_map
    if not isinstance(inner, Optimizer):
        raise TypeError(f"`inner_optimizer` must be a torch.optim.Optimizer. Received: {type(inner).__name__}")
    if hasattr(inner, "averaged_parameters"):  # SlowMo itself imports this module
        raise TypeError("`inner_optimizer` is a SlowMo optimizer already. Wrap the optimizer that it wraps.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module. Received: {type(model).__name__}")
    if not isinstance(config, SlowMoConfig):
        raise TypeError(f"`config` must be a SlowMoConfig. Received: {type(config).__name__}")
    if not isinstance(name, str) or not name:
        raise TypeError(f"`name` must be a string that is not empty. Received: {name!r}")
    if parameter_map is not None and not isinstance(parameter_map, ParameterMap):
        raise TypeError(f"`parameter_map` must be a ParameterMap. Received: {type(parameter_map).__name__}")
    check_statistics(settings.statistics, parameter_map)


def check_statistics(statistics: Any, parameter_map: ParameterMap | None) -> None:
    """Refuse a choice of statistics of the wrong type, or beside a map.

    Raises:
        TypeError, ValueError: naming the argument and the value received.
    """
    if statistics is None:
        return
    right = isinstance(statistics, Mapping) and all(
        isinstance(key, str) and isinstance(value, bool) for key, value in statistics.items()
    )
    if not right:
        raise TypeError(
            f'`statistics` must map patterns of names to bools, as {{"queue": False}}. Received: {statistics!r}'
        )
    if parameter_map is not None:
        raise ValueError("with a parameter_map the wire decides which tensors are averaged: give no `statistics`.")


def check_inner_optimizer(inner: Optimizer, config: SlowMoConfig) -> None:
    """Refuse an inner optimizer that can't serve these settings, now rather than in the middle of training."""
    for number, group in enumerate(inner.param_groups):
        if "lr" not in group:
            raise ValueError(f"parameter group {number} of the inner optimizer has no learning rate 'lr'.")
    if config.tau is not None and (config.inner_state == "reset" or config.nonfinite == "exclude"):
        fresh(inner)
    if (config.gradients != "local" or config.warmup_steps) and isinstance(inner, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates its closure as often as its own losses tell it, on every worker differently: "
            "gradients can't be averaged with it. Use gradients='local' without warm-up."
        )
