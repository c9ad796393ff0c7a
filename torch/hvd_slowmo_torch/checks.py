"""Checks of the constructor's arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from hvd_slowmo.checked_numbers import real
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.start.arguments import HOROVODS_ARGUMENTS, check_parameter_map, configured, refuse_wrapped
from hvd_slowmo.core.start.choice import check_statistics
from hvd_slowmo_torch.inner.inner_optimizer import check_state_dict, fresh
from hvd_slowmo_torch.inner.saved_inner import refuse_marked
from hvd_slowmo_torch.model.parallel import refuse_sharded
from hvd_slowmo_torch.worker import Settings


def refuse_without_model(owner: type, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Refuse hvd.DistributedOptimizer's arguments in place of the model, of which Python would only miss the model.

    Raises:
        TypeError: naming the argument and its replacement.
    """
    if len(arguments) < 2 and "model" not in options:
        configured(owner, None, {name: options[name] for name in options if name in HOROVODS_ARGUMENTS})


def try_configured(
    owner: type, config: SlowMoConfig | None, settings: Mapping[str, Any]
) -> tuple[SlowMoConfig, Exception | None]:
    """Return the configuration and None, or a default one and the error, which `check_types` raises on every rank."""
    try:
        return configured(owner, config, settings), None
    except (TypeError, ValueError) as error:
        return SlowMoConfig(), error


def check_types(inner: Any, model: Any, settings: Settings) -> None:
    """Refuse arguments of the wrong type, and settings that could not be read.

    Raises:
        TypeError, ValueError: naming the argument and what was received.
    """
    if not isinstance(inner, Optimizer):
        raise TypeError(f"`inner_optimizer` must be a torch.optim.Optimizer. Received: {type(inner).__name__}")
    refuse_wrapped(inner)
    if isinstance(model, (list, tuple)):
        raise TypeError(
            f"`model` must be one torch.nn.Module. Received: a {type(model).__name__} of {len(model)}. Put the modules "
            "into one: nn.ModuleList([encoder, decoder])."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module. Received: {type(model).__name__}")
    if settings.error is not None:
        raise settings.error
    refuse_sharded(model)
    check_values(model)
    check_parameter_map(settings.parameter_map)
    check_statistics(settings.statistics, settings.parameter_map)


def check_values(model: nn.Module) -> None:
    """Refuse parameters and buffers that have no values yet.

    Raises:
        ValueError: naming the first one.

    Example:
        >>> check_values(nn.Linear(2, 1))
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(f"{name} of a lazy module has no shape yet. Pass one batch through the model first.")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: it has no values. Give it some first.")


def check_inner_optimizer(inner: Optimizer, config: SlowMoConfig) -> None:
    """Refuse an inner optimizer that can't serve these settings, now rather than in the middle of training."""
    refuse_marked(inner)
    check_state_dict(inner)
    for number, group in enumerate(inner.param_groups):
        if "lr" not in group:
            raise ValueError(f"parameter group {number} of the inner optimizer has no learning rate 'lr'.")
        real(f"param_groups[{number}]['lr']", group["lr"], lambda rate: rate >= 0, "a finite number >= 0")
    if config.resets_inner_state:
        fresh(inner)
    if (config.gradients != "local" or config.warmup_steps) and isinstance(inner, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates its closure as often as its own losses tell it, on every worker differently: "
            "gradients can't be averaged with it. Use gradients='local' without warm-up."
        )
