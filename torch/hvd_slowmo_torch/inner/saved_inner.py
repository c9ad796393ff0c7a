"""Checks of an inner optimizer's saved state, before any of it is loaded: torch.optim looks at little of it.

The param_groups of SlowMo's state_dict have a mark. A plain optimizer that loads such a state drops the entry "slowmo"
without a word and keeps the mark, by which SlowMo knows it when it is wrapped. Groups that are trained have none.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from hvd_slowmo.errors import CheckpointError
from hvd_slowmo_torch.inner import inner_optimizer as inner_state
from hvd_slowmo_torch.inner.saved_values import check_value, number_of, refusal, spell_saved

_MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""State of SGD, Adam and AdamW that has its parameter's shape."""

_MARK = "slowmo"
"""Key of a param_group that a state_dict of SlowMo has."""

_CHOSEN_BY_TORCH = ("foreach", "fused")
"""Settings that PyTorch sets where they are None."""


def check_saved(inner: Optimizer, saved: Mapping[str, Any]) -> None:
    """Refuse a state_dict that `inner` would load, and that fails at one of its later steps.

    Args:
        inner: with the present groups and state. A class with a form of its own checks that itself.
        saved: a state_dict.

    Raises:
        CheckpointError: the message names the entry and what was found.

    Example:
        >>> inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> saved = inner.state_dict()
        >>> saved["param_groups"][0]["lr"] = "0.1"
        >>> check_saved(inner, saved)
        Traceback (most recent call last):
        hvd_slowmo.errors.CheckpointError: the state's param_groups[0]['lr'] must be a number. Received: '0.1'
    """
    if type(inner).load_state_dict is not Optimizer.load_state_dict or inner._optimizer_load_state_dict_pre_hooks:
        return
    for key, kind in (("param_groups", list), ("state", dict)):
        if not isinstance(saved.get(key), kind):
            raise refusal(key, f"a {kind.__name__}", saved.get(key))
    groups, present = saved["param_groups"], inner.param_groups
    if len(groups) != len(present):
        raise refusal("param_groups", f"a list of {len(present)} groups", groups)
    numbers: list[int] = []
    for number, (group, now) in enumerate(zip(groups, present, strict=True)):
        _check_group(f"param_groups[{number}]", group, now)
        numbers += group["params"]
    _check_complete(inner, groups)
    if len(set(numbers)) != len(numbers):
        raise refusal("param_groups", "groups of different parameters", numbers)
    parameters = dict(zip(numbers, (p for group in present for p in group["params"]), strict=True))
    needed = _needed_state(inner, groups) if saved["state"] else {}
    for number, state in saved["state"].items():
        if isinstance(number, int):
            if number not in parameters:
                raise refusal("state", f"of the parameters {reprlib.repr(numbers)}", number)
            _check_state(f"state[{number}]", inner, state, parameters[number], needed.get(number, ()))


def marked(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an inner optimizer's state_dict with the mark in its param_groups; `state` is not changed."""
    return _with_groups(state, lambda group: {**group, _MARK: True})


def unmarked(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state_dict without the mark; `state` is not changed."""
    return _with_groups(state, lambda group: {key: value for key, value in group.items() if key != _MARK})


def _with_groups(state: Mapping[str, Any], changed: Callable[[dict[Any, Any]], dict[Any, Any]]) -> dict[str, Any]:
    groups = state.get("param_groups")  # a file may have anything here, and a class of its own form too
    if not isinstance(groups, list):
        return dict(state)
    return {**state, "param_groups": [changed(group) if isinstance(group, dict) else group for group in groups]}


def refuse_marked(inner: Optimizer) -> None:
    """Refuse an inner optimizer that has loaded a state of SlowMo, before the rest of that state is lost.

    Raises:
        ValueError: with the order to write instead.
    """
    if any(_MARK in group for group in inner.param_groups):
        raise ValueError(
            "a state of SlowMo was loaded into the inner optimizer, which drops the slow momentum, the anchor and the "
            "step count. Construct first and load afterwards: optimizer = SlowMo(inner, model, ...); "
            "optimizer.load_state_dict(state). To begin at step 0 with the inner optimizer's part alone, remove the "
            f"mark before: for group in inner.param_groups: group.pop({_MARK!r}, None)."
        )


def _check_group(name: str, group: Any, present: Mapping[str, Any]) -> None:
    if not isinstance(group, dict):
        raise refusal(name, "a dict", group)
    count, numbers = len(present["params"]), group.get("params")
    integers = isinstance(numbers, list) and all(type(n) is int for n in numbers)
    if not isinstance(numbers, list) or not integers or len(numbers) != count:
        raise refusal(f"{name}['params']", f"the numbers of {count} parameters", numbers)
    if "lr" not in group:
        raise CheckpointError(f"the state's {name} has no 'lr'.")
    for key, value in group.items():
        if key in present and key != "params" and not (value is None and key in _CHOSEN_BY_TORCH):
            check_value(f"{name}[{key!r}]", value, present[key])
    if not 0 <= number_of(f"{name}['lr']", group["lr"]) < math.inf:
        raise refusal(f"{name}['lr']", "a finite number >= 0", group["lr"])


def _check_complete(inner: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse groups without a setting that one of PyTorch's own optimizers needs."""
    if not _is_of_torch(inner):
        return
    probe: Any = object.__new__(type(inner))  # as for unpickling, which completes groups of older versions of PyTorch
    probe.__setstate__({"defaults": {}, "state": {}, "param_groups": [{**group, "params": []} for group in groups]})
    for number, (group, present) in enumerate(zip(probe.param_groups, inner.param_groups, strict=True)):
        for key in inner.defaults:
            if key in present and key not in group:
                raise CheckpointError(f"the state's param_groups[{number}] has no {key!r}.")


def _check_state(name: str, inner: Optimizer, state: Any, parameter: torch.Tensor, needed: Collection[str]) -> None:
    """Refuse a parameter's state that lacks what a step needs, or has it in another shape.

    Args:
        needed: keys that a step needs.
    """
    if not isinstance(state, dict):
        raise refusal(name, "a dict", state)
    for key in needed if state else ():
        if key not in state:
            raise CheckpointError(f"the state's {name} has no {key!r}.")
    own = _is_of_torch(inner) and type(inner).__name__ not in ("Adafactor", "LBFGS")  # these keep other shapes
    present = inner.state.get(parameter, {})
    for key, value in state.items():
        where, now = f"{name}[{key!r}]", present.get(key)
        whole = isinstance(now, torch.Tensor) and now.shape == parameter.shape and now.dim() > 0
        if (own and key in _MOMENTS) or whole:
            if value is not None or key in needed:
                _check_whole(where, value, parameter)
        elif own and key == "step":
            if not 0 <= number_of(where, value) < math.inf:
                raise refusal(where, "a number >= 0", value)
        elif own and isinstance(value, torch.Tensor) and value.numel() != 1:
            _check_whole(where, value, parameter)


def _check_whole(name: str, value: Any, parameter: torch.Tensor) -> None:
    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        raise refusal(name, f"a tensor of shape {tuple(parameter.shape)}", spell_saved(value))
    if parameter.is_floating_point() and not value.is_floating_point():
        raise refusal(name, "floating-point numbers", spell_saved(value))


def _needed_state(inner: Optimizer, groups: Sequence[Mapping[str, Any]]) -> dict[int, Collection[str]]:
    """Return the keys that a step of one of PyTorch's optimizers needs of a parameter's state, by its number."""
    if type(inner) in (torch.optim.Adam, torch.optim.AdamW):
        keys = ("step", "exp_avg", "exp_avg_sq")
        return {n: (*keys, "max_exp_avg_sq") if g.get("amsgrad") else keys for g in groups for n in g["params"]}
    if type(inner) is torch.optim.SGD or not _is_of_torch(inner):
        return {}
    kept = inner_state.kept(inner) or {}
    parameters = [p for group in inner.param_groups for p in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    return {number: kept.get(id(p), ()) for number, p in zip(numbers, parameters, strict=True)}


def _is_of_torch(inner: Optimizer) -> bool:
    return type(inner).__module__.startswith("torch.optim.")
