"""The inner optimizer: its state before the first step, its state to average, and its step under a GradScaler.

A scaler that skipped the whole of SlowMo.step() after an overflow would leave one worker a step behind the others, and
later all of them in a deadlock (PyTorch issue 76282). So SlowMo declares that it handles scaling itself: the scaler
then always calls step(), and only the inner optimizer's step is skipped.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from hvd_slowmo.errors import spell_error
from hvd_slowmo_torch.inner import inner_settings


def fresh(inner: Optimizer) -> Optimizer:
    """Return a new optimizer of the same class and settings over the same parameters.

    Some classes (Adagrad) fill their state when they are made, so an empty state is not "before the first step".

    Raises:
        ValueError: the class can't be made again from its defaults.
    """
    accepted = inspect.signature(type(inner).__init__).parameters
    settings = {key: value for key, value in inner.defaults.items() if key in accepted}
    try:
        return type(inner)([dict(group) for group in inner.param_groups], **settings)
    except TypeError as error:
        raise ValueError(
            "inner_state='reset', nonfinite='exclude' and a checkpoint from before the first step need to make a new "
            f"{type(inner).__name__} to know its state then, and that failed: {error}. Use inner_state='maintain' and "
            "nonfinite='raise'; load into an optimizer without steps."
        ) from error


def reset(inner: Optimizer) -> None:
    """Reset the state, and the values that steps change elsewhere, to those from before the first step.

    Rates and other settings stay.
    """
    replace(inner, fresh(inner).state)
    inner_settings.reset(inner)


def check_state_dict(inner: Optimizer) -> None:
    """Refuse an optimizer whose state_dict can't be sent, or is not in torch.optim's form, or can't be loaded.

    Raises:
        ValueError: naming what is missing or has failed.
    """
    state = inner.state_dict()
    missing = {"state", "param_groups"} - set(state)
    if missing:
        raise ValueError(
            f"the state_dict of {type(inner).__name__} has no {' and no '.join(map(repr, sorted(missing)))}, which "
            "those of torch.optim have: the workers can't be given rank 0's. Wrap the torch.optim.Optimizer within it."
        )
    try:
        pickle.dumps(_without_tensors(state))
        if type(inner).load_state_dict is not Optimizer.load_state_dict:
            _scratch(inner)[0].load_state_dict(state)
    except Exception as error:  # a class of the user's own may raise anything
        raise ValueError(
            f"the state_dict of {type(inner).__name__} can't be given to another worker: {spell_error(error)}. Keep "
            "in param_groups and state what can be pickled and loaded."
        ) from error


def _without_tensors(item: Any) -> Any:
    """Return the same structure without its tensors, which can always be pickled and may be large."""
    if isinstance(item, torch.Tensor):
        return None
    if isinstance(item, Mapping):
        return {key: _without_tensors(value) for key, value in item.items()}
    return [_without_tensors(value) for value in item] if isinstance(item, (list, tuple)) else item


def replace(inner: Optimizer, state: Mapping[torch.Tensor, Any]) -> None:
    """Replace the state."""
    inner.state.clear()
    inner.state.update(state)


def averaged(inner: Optimizer) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return the state that the inner optimizer keeps: per key, (parameter, tensor like its state), in parameter order.

    Found by one step of a copy over zeros, because a worker may not have a gradient for every parameter yet and all
    must agree on what they exchange.

    Raises:
        ValueError: state that is no floating-point tensor, or no step without a closure.
    """
    try:
        stepped = _stepped(inner)
    except Exception as error:  # a class of the user's own may raise anything
        raise ValueError(
            f"inner_state='average' can't work with {type(inner).__name__}, which takes no plain step: {error}. "
            "Use inner_state='maintain' or 'reset'."
        ) from error
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for parameter, state in stepped:
        for key, value in state.items():
            if value is None:
                continue
            if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                raise ValueError(
                    f"inner_state='average' can't work with {type(inner).__name__}: its state {key!r} is no "
                    f"floating-point tensor but {type(value).__name__}. Use inner_state='maintain' or 'reset'."
                )
            found.setdefault(key, []).append((parameter, value))
    return found


def kept(inner: Optimizer) -> dict[int, set[str]] | None:
    """Return the names of each parameter's state after a step, by the parameter's id; None where no step can tell."""
    try:
        stepped = _stepped(inner)
    except Exception:  # a class of the user's own may raise anything
        return None
    return {id(p): {key for key, value in state.items() if value is not None} for p, state in stepped}


def _stepped(inner: Optimizer) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Return each parameter and the state that a copy keeps for it after one step over zeros."""
    scratch, twins = _scratch(inner)
    for twin in twins.values():
        twin.grad = torch.zeros_like(twin)
    if hasattr(scratch, "train"):  # schedule-free optimizers take no step before it
        scratch.train()
    scratch.step()
    return [(p, scratch.state[twins[id(p)]]) for group in inner.param_groups for p in group["params"]]


def _scratch(inner: Optimizer) -> tuple[Optimizer, dict[int, torch.Tensor]]:
    """Return a copy over zeros in place of the parameters, and these by the parameters' ids."""
    parameters = [p for group in inner.param_groups for p in group["params"]]
    twins = {id(p): torch.zeros_like(p, requires_grad=True) for p in parameters}
    memo: dict[int, Any] = dict(twins)  # puts the twin wherever a parameter stands
    scratch = copy.deepcopy(inner, memo)
    for name, value in vars(inner).items():  # PyTorch copies what it knows, and leaves out a subclass's own
        if name not in vars(scratch) and name != "step":  # a scheduler sets that one, and it steps the original
            try:
                setattr(scratch, name, copy.deepcopy(value, memo))
            except Exception:  # a lock, a process group: the copy shares it
                setattr(scratch, name, value)
    return scratch, twins


Form = tuple[torch.Size, torch.dtype, torch.device]
"""Of a tensor that is not there yet."""


def state_tensor(inner: Optimizer, parameter: torch.Tensor, key: str, form: Form) -> torch.Tensor:
    """Return one tensor of the state; where this worker has none yet, zeros that are not kept."""
    if is_missing(inner, parameter, key):
        return _zeros(form)
    found: torch.Tensor = inner.state[parameter][key]
    return found


def is_missing(inner: Optimizer, parameter: torch.Tensor, key: str) -> bool:
    """Return whether this worker has no such state yet."""
    return parameter not in inner.state or inner.state[parameter].get(key) is None


def begin(inner: Optimizer, parameter: torch.Tensor, forms: Mapping[str, Form]) -> None:
    """Make what is missing of a parameter's state, as zeros: an optimizer that finds any state makes no more.

    Args:
        forms: of all of the state, by key.
    """
    for key, form in forms.items():
        if is_missing(inner, parameter, key):
            inner.state[parameter][key] = _zeros(form)


def _zeros(form: Form) -> torch.Tensor:
    shape, dtype, device = form
    return torch.zeros(shape, dtype=dtype, device=device)


def scaled_step(inner: Optimizer, grad_scale: torch.Tensor | None, found_inf: Any) -> Any:
    """Take the inner optimizer's step as the scaler would have taken it.

    Args:
        inner: the inner optimizer.
        grad_scale: the factor of the gradients; None if they are unscaled already.
        found_inf: greater than 0 if a gradient is not finite; a tensor, or 0 if there are no gradients.
    """
    if getattr(inner, "_step_supports_amp_scaling", False):  # fused: reads both on the device, without waiting for them
        inner.grad_scale, inner.found_inf = grad_scale, found_inf  # type: ignore[attr-defined]
        try:
            return inner.step()
        finally:
            del inner.grad_scale, inner.found_inf  # type: ignore[attr-defined]
    if float(found_inf) > 0:
        return None
    if grad_scale is not None:
        _unscale(inner, grad_scale)
    return inner.step()


def _unscale(inner: Optimizer, grad_scale: torch.Tensor) -> None:
    """Divide by the scale with the scaler's own operation, so that the results are bitwise the scaler's."""
    inverse = grad_scale.double().reciprocal().float()
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
    for group in inner.param_groups:
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.dtype == torch.float16:
                raise ValueError("Attempting to unscale FP16 gradients. Keep the parameters in float32 under autocast.")
            values = p.grad._values() if p.grad.is_sparse else p.grad
            alike[values.device, values.dtype].append(values)
    for (device, _), gradients in alike.items():
        ignored = torch.zeros(1, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, ignored, inverse.to(device))
