"""The workers' mean of losses and metrics, apart from the training: `mean` of both doors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.checked_numbers import real
from hvd_slowmo.comm.protocol import Comm, ScopedComm
from hvd_slowmo.core.start.handshake import agree, agreed

Arrays = dict[Any, NDArray[np.float64]]

NAME = "slowmo.mean"
"""Prefix of the collectives' names."""


def mean_of(
    comm: Comm,
    value: Any,
    weight: float,
    to_numpy: Callable[[Any], Any] = np.asarray,
    like: Callable[[Any, NDArray[np.float64]], Any] = lambda value, mean: float(mean),
) -> Any:
    """Return the weighted mean over the workers of a value, or of each value of a dict. A collective.

    Args:
        value: a number or a tensor, or a dict of them.
        weight: of this worker, finite and >= 0.
        to_numpy: returns a value as NumPy's; an adapter's own tensors.
        like: returns a mean in the form of this worker's value, which is None where only others have it.

    Raises:
        TypeError, ValueError: as `weighted_mean`.

    Example:
        >>> from hvd_slowmo.comm.threads import ThreadWorld
        >>> ThreadWorld(2).run(lambda comm: mean_of(comm, float(comm.rank), weight=1 + 2 * comm.rank))
        [0.75, 0.75]
    """
    if isinstance(value, Mapping):
        means = weighted_mean(comm, value, weight, to_numpy)
        return {name: like(value.get(name), mean) for name, mean in means.items()}
    return like(value, weighted_mean(comm, {"": value}, weight, to_numpy)[""])


def weighted_mean(
    comm: Comm, values: Mapping[Any, Any], weight: float, to_numpy: Callable[[Any], Any] = np.asarray
) -> Arrays:
    """Return the mean of each value over the workers. A collective.

    Workers of weight 0 take no part, whatever their values are, and may lack some. If all weights are 0 the mean is
    NaN.

    Args:
        values: by name; names and shapes are those of the other workers.
        weight: of this worker, finite and >= 0.
        to_numpy: as in `mean_of`.

    Raises:
        TypeError, ValueError: on every rank, if one's weight or value is no number, or names or shapes differ.
    """
    scoped = ScopedComm(comm, NAME)

    def make() -> tuple[tuple[Arrays, float], dict[str, Any]]:
        return (
            _arrays(values, to_numpy),
            real("weight", weight, lambda number: number >= 0, "a finite number >= 0"),
        ), {}

    everyone: list[tuple[Arrays, float]] = scoped.gather("values", agreed(scoped, make, {}))
    counted = [(rank, *each) for rank, each in zip(comm.ranks, everyone, strict=True) if each[1] > 0]
    if not counted:
        return {name: np.full(each.shape, math.nan) for own, _ in everyone for name, each in own.items()}
    first, expected, _ = counted[0]
    for rank, own, _ in counted:
        if _shapes(own) != _shapes(expected):
            raise ValueError(
                f"{NAME}: rank {rank} differs from rank {first}: it has {_spell(own)} where {_spell(expected)} is "
                "expected. Give the same values on every rank, or weight=0 where a rank has none."
            )
    total = sum(share for _, _, share in counted)
    with np.errstate(over="ignore", invalid="ignore"):
        return {name: np.asarray(sum(own[name] * share for _, own, share in counted) / total) for name in expected}


def agree_on_success(comm: Comm, error: Exception | None) -> None:
    """Raise what has failed on a worker before a mean, on every worker. A collective.

    Args:
        error: of this worker, if it has met one.

    Raises:
        Exception: on every worker of one type; the text names the rank.

    Example:
        >>> from hvd_slowmo.comm.threads import ThreadWorld
        >>> ThreadWorld(2).run(lambda comm: agree_on_success(comm, None))
        [None, None]
    """
    agree(ScopedComm(comm, NAME), {}, {}, error)


def _arrays(values: Mapping[Any, Any], to_numpy: Callable[[Any], Any]) -> Arrays:
    found = {}
    for name, value in values.items():
        array = np.asarray(to_numpy(value))
        if array.dtype.kind not in "biuf":
            label = "`value`" if name == "" else f"`value[{name!r}]`"
            raise TypeError(f"{label} must be a number or a tensor of numbers. Received: {value!r}")
        found[name] = array.astype(np.float64)
    return found


def _shapes(values: Arrays) -> dict[Any, tuple[int, ...]]:
    return {name: value.shape for name, value in values.items()}


def _spell(values: Arrays) -> str:
    return ", ".join(f"{name or 'a value'} of shape {each.shape}" for name, each in values.items()) or "no value"
