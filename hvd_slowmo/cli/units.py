"""Amounts with units on the command line, as types of argparse's."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping

_AMOUNT = re.compile(r"([0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+(?:e[+-]?[0-9]+)?)\s*(\S*)")

_COUNT = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_BYTES_PER_SECOND = {
    **{
        f"{prefix}bit{ending}": factor / 8
        for prefix, factor in (("k", 1e3), ("K", 1e3), ("m", 1e6), ("M", 1e6), ("g", 1e9), ("G", 1e9))
        for ending in ("", "/s")
    },
    **{f"{prefix}B/s": factor for prefix, factor in (("k", 1e3), ("M", 1e6), ("G", 1e9))},
}


def count(text: str) -> int:
    """Return a positive number of things.

    Example:
        >>> count("25.2M"), count("7B"), count("4096")
        (25200000, 7000000000, 4096)
    """
    number = _amount(text, _COUNT, "a positive number such as 25.2M, 7B or 4096")
    if number != int(number):
        raise argparse.ArgumentTypeError(f"must be a whole number. Received: {text}")
    return int(number)


def seconds(text: str) -> float:
    """Return a positive time in seconds.

    Example:
        >>> seconds("180ms"), seconds("0.5 s")
        (0.18, 0.5)
    """
    return _amount(text, _SECONDS, "a positive time such as 180ms, 0.2s or 50us")


def seconds_or_zero(text: str) -> float:
    """Return a time in seconds, which may be 0.

    Example:
        >>> seconds_or_zero("0ms")
        0.0
    """
    return _amount(text, _SECONDS, "a time such as 0.5ms, 50us or 0s", least=0.0)


def bytes_per_second(text: str) -> float:
    """Return a bandwidth in bytes per second; bits as `tc` writes them.

    Example:
        >>> bytes_per_second("1gbit"), bytes_per_second("100Mbit/s"), bytes_per_second("1.5GB/s")
        (125000000.0, 12500000.0, 1500000000.0)
    """
    return _amount(text, _BYTES_PER_SECOND, "a positive bandwidth such as 1gbit, 100mbit or 1.5GB/s")


def share(text: str) -> float:
    """Return a share of a whole, given in percent.

    Example:
        >>> share("5%")
        0.05
    """
    return _amount(text, {"%": 0.01}, "a positive number of percent such as 5%")


def _amount(text: str, units: Mapping[str, float], allowed: str, least: float = math.ulp(0.0)) -> float:
    """Return a number times its unit, from `least` on."""
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or found[2] not in units:
        raise argparse.ArgumentTypeError(f"must be {allowed}. Received: {text}")
    # The division gives 180 ms the nearest float to 0.18, where a product with 1e-3 would not.
    number, unit = float(found[1]), units[found[2]]
    value = number / round(1 / unit) if unit < 1 else number * unit
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be {allowed}. Received: {text}")
    return value
