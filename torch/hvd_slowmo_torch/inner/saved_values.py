"""Values of a saved state that are of another kind than the present ones: refused, with place and finding."""

from __future__ import annotations

import math
import reprlib
from typing import Any

import torch

from hvd_slowmo.errors import CheckpointError


def check_value(name: str, value: Any, present: Any) -> None:
    """Refuse a value of another kind than the present one: a number, a text, a bool, or a sequence of these.

    A present None, and objects of other types, may become anything.

    Raises:
        CheckpointError: with `name` and what was found.

    Example:
        >>> check_value("betas", (0.5, 0.5), (0.9, 0.999))
    """
    if isinstance(present, bool):
        if not isinstance(value, bool):
            raise refusal(name, "True or False", value)
    elif isinstance(present, (int, float)) or (isinstance(present, torch.Tensor) and present.numel() == 1):
        if math.isnan(number_of(name, value)):
            raise refusal(name, "a number", value)
    elif isinstance(present, str):
        if not isinstance(value, str):
            raise refusal(name, "a text", value)
    elif isinstance(present, (list, tuple)):
        if not isinstance(value, (list, tuple)) or (isinstance(present, tuple) and len(value) != len(present)):
            raise refusal(name, f"{len(present)} values", value)
        for number, (part, like) in enumerate(zip(value, present, strict=False)):
            check_value(f"{name}[{number}]", part, like)


def number_of(name: str, value: Any) -> float:
    """Return a number, or the one in a tensor of one element.

    Raises:
        CheckpointError: with `name` and what was found.

    Example:
        >>> number_of("step", torch.tensor(2.0))
        2.0
    """
    tensor = isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()
    if not tensor and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise refusal(name, "a number", spell_saved(value))
    try:
        return float(value)
    except OverflowError:
        return math.inf


def spell_saved(value: Any) -> Any:
    """Return a value as a message may show it: the form of a tensor, and not its elements.

    Example:
        >>> spell_saved(torch.ones(2))
        'a tensor of shape (2,), torch.float32'
    """
    return f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, torch.Tensor) else value


def refusal(name: str, allowed: str, found: Any) -> CheckpointError:
    """Return the error about an entry of a state.

    Example:
        >>> print(refusal("state", "a dict", 3))
        the state's state must be a dict. Received: 3
    """
    return CheckpointError(f"the state's {name} must be {allowed}. Received: {reprlib.repr(found)}")
