"""Saved scalars: their shapes are this worker's, and their values are ones that a run can reach."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.errors import CheckpointError

_UP_TO_STEP = ("since", "rate_steps", "launched", "sent_since", "sent_rate_steps")
"""Counts of steps, or their numbers, none of which is beyond the present one."""


def check_progress(saved: Progress, present: Progress) -> None:
    """Refuse scalars that no run reaches with these settings, model and workers.

    Args:
        saved: with NumPy arrays or numbers.
        present: this worker's.

    Raises:
        CheckpointError: naming the field, what was found, and what is possible.

    Example:
        >>> from hvd_slowmo.core.parts.progress import Flight, PushSum
        >>> nothing = np.zeros(0)
        >>> mixing, flight = PushSum(nothing, nothing, 0), Flight(nothing, nothing, nothing, nothing)
        >>> progress = Progress(3, nothing, nothing, nothing, nothing, 0, nothing, mixing, flight)
        >>> check_progress(progress._replace(step=-1), progress)
        Traceback (most recent call last):
        hvd_slowmo.errors.CheckpointError: the position's 'step' must be an integer >= 0. Received: -1
    """
    fields = present.flat()
    for field, value in saved.flat().items():
        array, like = np.asarray(value), np.asarray(fields[field])
        if array.shape != like.shape:
            raise CheckpointError(f"the position's {field!r} has shape {array.shape}, here it is {like.shape}.")
        if like.dtype.kind == "i":
            _check(field, array, (array.dtype.kind == "i") & (array >= 0), "an integer >= 0")
        elif field == "weights":
            _check(field, array, np.isfinite(array) & (array > 0), "finite and > 0")
        elif field != "observed":  # measurements, which may be of a run that diverges
            _check(field, array, np.isfinite(array) & (array >= 0), "finite and >= 0")
    for field in _UP_TO_STEP:
        array = np.asarray(saved.flat()[field])
        _check(field, array, array <= saved.step, f"at most the step, {saved.step}")


def parse_progress(values: Any, present: Progress) -> Progress:
    """Return scalars that were saved as numbers and lists of numbers, each field in the type of this worker's.

    Raises:
        CheckpointError: a field is missing or unknown, or it is no number of the field's type, or as `check_progress`.
    """
    fields = {field: np.asarray(value) for field, value in present.flat().items()}
    if not isinstance(values, dict):
        raise CheckpointError(f"the position must be a dict. Received: {reprlib.repr(values)}")
    for field in sorted(fields.keys() ^ values.keys(), key=str):
        raise CheckpointError(f"the position {'has no' if field in fields else 'has an unknown'} field {field!r}.")
    parsed: dict[str, Any] = {}
    for field, like in fields.items():
        try:
            array = np.asarray(values[field])
        except (ValueError, OverflowError, RecursionError):  # lists of different lengths, or too deep
            array = np.asarray(None)
        if array.dtype.kind not in ("i" if like.dtype.kind == "i" else "fi") and array.size + like.size > 0:
            kind = "integers" if like.dtype.kind == "i" else "numbers"
            raise CheckpointError(
                f"the position's {field!r} must be {kind} of shape {like.shape}. Received: "
                f"{reprlib.repr(values[field])}"
            )
        if array.size == like.size == 0:
            array = like  # a list without elements has no other axes
        parsed[field] = int(array) if array.ndim == like.ndim == 0 else array.astype(like.dtype)
    result = Progress.from_flat(parsed)
    check_progress(result, present)
    return result


def check_rates(rates: NDArray[np.float64]) -> None:
    """Refuse learning rates with which no optimizer makes a step.

    Raises:
        CheckpointError: one is negative or not finite.

    Example:
        >>> check_rates(np.array([0.1, 0.0]))
    """
    _check("learning_rate", rates, np.isfinite(rates) & (rates >= 0), "finite and >= 0")


def _check(field: str, array: NDArray[Any], valid: Any, allowed: str) -> None:
    if not np.all(valid):
        first = array[~np.broadcast_to(valid, array.shape)].flat[0]
        raise CheckpointError(f"the position's {field!r} must be {allowed}. Received: {first}")
