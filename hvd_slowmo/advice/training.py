"""The user's training: the time of a step without an exchange, and the model's size; measured, or given."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

BACKWARD = 0.5
"""Share of a step in which gradients appear one after another, where nobody has measured it."""


class Training(NamedTuple):
    """A step of one worker. `slowmo.measure` measures it.

    Attributes:
        seconds: of a step without an exchange.
        parameters: number of parameters.
        length: their bytes as they travel.
        work: processor seconds of that step, over all threads; 0 where a device computes.
        backward: seconds of the step during which gradients appear, so that they can be sent beside it.
        exchange: seconds that a step with an exchange took longer, in the run that was measured; 0 if unknown.
        steps: number of steps that were measured; 0 if given.

    Example:
        >>> training_of(parameters=1000, seconds=0.1)
        Training(seconds=0.1, parameters=1000, length=4000, work=0.0, backward=0.05, exchange=0.0, steps=0)
    """

    seconds: float
    parameters: int
    length: int
    work: float
    backward: float
    exchange: float = 0.0
    steps: int = 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, which `hvd-slowmo advise --measured` reads."""
        Path(path).write_text(json.dumps(self._asdict(), indent=2) + "\n", encoding="utf-8")


def training_of(parameters: int, seconds: float, work: float = 0.0) -> Training:
    """Return a training run of parameters in float32 with this step time."""
    return Training(seconds, parameters, 4 * parameters, work, BACKWARD * seconds)


def load_training(path: str | os.PathLike[str]) -> Training:
    """Return the training run in a file of `Training.save`.

    Raises:
        ValueError: the file is none.
        OSError: it can't be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     training_of(parameters=1000, seconds=0.1).save(f"{directory}/step.json")
        ...     load_training(f"{directory}/step.json").length
        4000
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:  # of JSON or of UTF-8
        found = None
    if not _is_training(found):
        raise ValueError(f"{os.fspath(path)} is not a file of slowmo.measure(optimizer).save(path).")
    training = Training(**found)
    if not (training.seconds and training.parameters and training.length):
        raise ValueError(f"{os.fspath(path)}: step time and parameters must be positive. Received: {training}")
    return training


def _is_training(found: Any) -> bool:
    """Return whether these are all fields, with finite numbers >= 0: whole ones where things are counted."""
    if not isinstance(found, dict) or set(found) != set(Training._fields):
        return False
    counted = ("parameters", "length", "steps")
    return all(
        isinstance(value, int if name in counted else (int, float))
        and not isinstance(value, bool)
        and 0 <= value < math.inf
        for name, value in found.items()
    )
