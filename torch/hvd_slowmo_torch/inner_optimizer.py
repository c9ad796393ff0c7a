"""The base optimizer's own state: what a reset brings back and what an average runs over."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer


def fresh(base: Optimizer) -> Optimizer:
    """A new optimizer of the same class and settings over the same parameters.

    Some classes (Adagrad) fill their state when they are made, so an empty state is not "before the first step".

    Raises:
        ValueError: the class can't be made again from its defaults.
    """
    accepted = inspect.signature(type(base).__init__).parameters
    settings = {key: value for key, value in base.defaults.items() if key in accepted}
    try:
        return type(base)([dict(group) for group in base.param_groups], **settings)
    except TypeError as error:
        raise ValueError(
            "buffers='reset', nonfinite='exclude' and a checkpoint of before the first step need to make a new "
            f"{type(base).__name__} to know its buffers then, and that failed: {error}. Use buffers='maintain' and "
            "nonfinite='raise'; load into an optimizer without steps."
        ) from error


def reset(base: Optimizer) -> None:
    """Bring the state back to what it was before the first step; rates and other settings stay."""
    replace(base, fresh(base).state)


def replace(base: Optimizer, state: Mapping[torch.Tensor, Any]) -> None:
    """Give it another state."""
    base.state.clear()
    base.state.update(state)


def averaged(base: Optimizer) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Which state the base optimizer keeps: for each key, (parameter, tensor like its state), in parameter order.

    Found by one step of a copy over zeros, because a worker may not have a gradient for every parameter yet and all
    must agree on what they exchange.

    Raises:
        ValueError: state that is no floating-point tensor, or no step without a closure.
    """
    try:
        stepped = _stepped(base)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"buffers='average' can't work with {type(base).__name__}, which takes no plain step: {error}. "
            "Use buffers='maintain' or 'reset'."
        ) from error
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for parameter, state in stepped:
        for key, value in state.items():
            if value is None:
                continue
            if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                raise ValueError(
                    f"buffers='average' can't work with {type(base).__name__}: its state {key!r} is no floating-point "
                    f"tensor but {type(value).__name__}. Use buffers='maintain' or 'reset'."
                )
            found.setdefault(key, []).append((parameter, value))
    return found


def kept(base: Optimizer) -> dict[int, set[str]] | None:
    """The names of each parameter's buffers after a step, by the parameter's id; None where no step can tell."""
    try:
        stepped = _stepped(base)
    except Exception:  # a class of the user's own may raise anything
        return None
    return {id(p): {key for key, value in state.items() if value is not None} for p, state in stepped}


def _stepped(base: Optimizer) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Each parameter and what a copy keeps for it after one step over zeros."""
    parameters = [p for group in base.param_groups for p in group["params"]]
    twins = {id(p): torch.zeros_like(p, requires_grad=True) for p in parameters}
    scratch = copy.deepcopy(base, dict(twins))  # the memo puts the twin wherever a parameter stands
    for twin in twins.values():
        twin.grad = torch.zeros_like(twin)
    scratch.step()
    return [(p, scratch.state[twins[id(p)]]) for p in parameters]


def state_tensor(
    base: Optimizer, parameter: torch.Tensor, key: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """One tensor of the state; where this worker has none yet, zeros take its place."""
    state: dict[str, Any] = base.state[parameter]
    if state.get(key) is None:
        state[key] = torch.zeros(shape, dtype=dtype, device=device)
    found: torch.Tensor = state[key]
    return found
