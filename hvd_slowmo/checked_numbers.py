"""Numbers that users give, checked where they come in: Python can turn some into no number, or into one too large."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable
from typing import Any

_LARGEST = 2**63 - 1  # a counter in a trace is an int64


def integer(name: str, value: Any, least: int, allowed: str) -> int:
    """Return an integer from `least` to 2**63 - 1.

    Args:
        name: of the setting.
        allowed: values, in words.

    Raises:
        TypeError: it is no integer.
        ValueError: it is too small or too large.

    Example:
        >>> integer("tau", 10**400, 1, "a positive integer")
        Traceback (most recent call last):
            ...
        ValueError: `tau` must be a positive integer, at most 9223372036854775807. Received: tau=an integer of 1329 bits
    """
    try:
        number = operator.index(value)
    except Exception:  # an object of the user's own may raise anything
        raise TypeError(f"`{name}` must be {allowed}. Received: {name}={spell_value(value)}") from None
    if isinstance(value, bool):
        raise TypeError(f"`{name}` must be {allowed}. Received: {name}={value!r}")
    if number > _LARGEST:
        raise ValueError(f"`{name}` must be {allowed}, at most {_LARGEST}. Received: {name}={spell_value(number)}")
    if number < least:
        raise ValueError(f"`{name}` must be {allowed}. Received: {name}={spell_value(number)}")
    return number


def real(name: str, value: Any, valid: Callable[[float], bool], allowed: str) -> float:
    """Return a finite number for which `valid` is true.

    Args:
        name: of the setting.
        allowed: values, in words.

    Raises:
        TypeError: it is no number.
        ValueError: it is too large, not finite, or not valid.

    Example:
        >>> real("beta", 0.5, lambda b: 0 <= b < 1, "a number in [0, 1)")
        0.5
    """
    if isinstance(value, (bool, str, bytes, bytearray)):
        raise TypeError(f"`{name}` must be {allowed}. Received: {name}={value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except Exception:  # an object of the user's own may raise anything
        raise TypeError(f"`{name}` must be {allowed}. Received: {name}={spell_value(value)}") from None
    if not (math.isfinite(number) and valid(number)):
        raise ValueError(f"`{name}` must be {allowed}. Received: {name}={spell_value(value)}")
    return number


def number_or_nan(value: Any) -> float:
    """Return a number that workers judge together: NaN, which they refuse, for all that is none.

    Example:
        >>> number_or_nan("0.1"), number_or_nan(0.1)
        (nan, 0.1)
    """
    if isinstance(value, (str, bytes, bytearray)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except Exception:  # an object of the user's own may raise anything
        return math.nan


def spell_value(value: Any) -> str:
    """Return a value in a few words: Python refuses to print very long integers.

    Example:
        >>> spell_value("0.1"), spell_value(10**400)
        ("'0.1'", 'an integer of 1329 bits')
    """
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    own = type(value).__module__ != "builtins" or type(value) is object  # its repr may raise too
    if own:
        return f"an object of type {type(value).__name__}"
    return reprlib.repr(value) if isinstance(value, (list, tuple, dict, set, frozenset)) else repr(value)


def flag(name: str, value: object) -> None:
    """Refuse anything but True and False.

    Raises:
        TypeError: the value is neither.

    Example:
        >>> flag("nesterov", 1)
        Traceback (most recent call last):
            ...
        TypeError: `nesterov` must be True or False. Received: nesterov=1
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False. Received: {name}={spell_value(value)}")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is none of some words.

    Raises:
        TypeError: it is no string.
        ValueError: it is another string.

    Example:
        >>> one_of("gradients", "none", ("local", "node", "all"))
        Traceback (most recent call last):
            ...
        ValueError: `gradients` must be one of 'local', 'node', 'all'. Received: gradients='none'
    """
    if not isinstance(value, str):
        raise TypeError(
            f"`{name}` must be one of {', '.join(map(repr, allowed))}. Received: {name}={spell_value(value)}"
        )
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}. Received: {name}={value!r}")
