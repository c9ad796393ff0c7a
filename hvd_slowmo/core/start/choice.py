"""The user's choice by name: which tensors that are not trained are averaged (`statistics=` of SlowMo)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from hvd_slowmo.checked_numbers import spell_value
from hvd_slowmo.wire.parameter_map import ParameterMap

Names: TypeAlias = tuple[str, ...]
"""The names of a tensor, of which a pattern has to fit one; messages have the first."""

logger = logging.getLogger("hvd_slowmo")


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
            '`statistics` must map patterns of names to bools, as {"queue": False}. Received: '
            + spell_value(statistics)
        )
    if parameter_map is not None:
        raise ValueError("with a parameter_map the wire decides which tensors are averaged: give no `statistics`.")


def check_patterns(untrained: Sequence[Names], choice: Mapping[str, bool]) -> None:
    """Refuse a pattern by which nothing would be averaged, and warn of one by which nothing is left alone yet.

    Args:
        untrained: names of the tensors among which there is a choice.
        choice: as in `is_averaged`.

    Raises:
        ValueError: naming the pattern.
    """
    for pattern, averaged in choice.items():
        if any(_fits(names, pattern) for names in untrained):
            continue
        words = (
            f"`statistics` has {pattern!r}, and no tensor of that name is there that is not trained. These are: "
            f"{', '.join(name for name, *_ in untrained) or 'none'}."
        )
        if averaged:
            raise ValueError(words)
        # The model may make such a tensor in its first forward pass.
        logger.warning("%s One that the model makes later will be left alone.", words)


def is_averaged(names: Names, choice: Mapping[str, bool], *, usual: bool, dtype: str, has_mean: bool) -> bool:
    """Return whether a tensor that is not trained is averaged.

    Args:
        choice: for patterns of names (as in `fnmatch`), whether what they fit is averaged; the last one that fits
            decides.
        usual: where none fits.
        dtype: of the tensor, for the error.
        has_mean: its values are real numbers.

    Raises:
        TypeError: it is chosen and has no mean.
    """
    chosen = choice_of(names, choice)
    if chosen and not has_mean:
        raise TypeError(f"`statistics` averages {names[0]}, which has type {dtype} and no mean.")
    return usual if chosen is None else chosen


def choice_of(names: Names, choice: Mapping[str, bool]) -> bool | None:
    """Return whether a tensor of these names is averaged by choice; None where no pattern fits it.

    Example:
        >>> choice_of(("block.cache",), {"*": True, "*cache": False})
        False
    """
    return next((choice[pattern] for pattern in reversed(list(choice)) if _fits(names, pattern)), None)


def _fits(names: Names, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)
