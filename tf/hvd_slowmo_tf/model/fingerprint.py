"""Values that a model is given from outside between two trainings: loaded weights, or Keras' moving average."""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf


class Fingerprint:
    """A number for each variable, which other values would change, and the steps at which it was taken.

    Args:
        steps: returns the number of steps.
    """

    def __init__(self, steps: Callable[[], int]) -> None:
        self._steps = steps
        self._taken: tuple[int, list[float]] | None = None

    def take(self, variables: list[keras.Variable]) -> None:
        """Take the fingerprint of the variables as they are."""
        self._taken = self._of(variables)

    def forget(self) -> None:
        """Take any values as they are from now on."""
        self._taken = None

    def differs(self, variables: list[keras.Variable]) -> bool:
        """Return whether the variables have other values than when it was taken, without a step in between."""
        if self._taken is None:
            return False
        found = self._of(variables)
        return found[0] == self._taken[0] and found != self._taken

    def _of(self, variables: list[keras.Variable]) -> tuple[int, list[float]]:
        return self._steps(), [float(tf.norm(tf.cast(v, tf.float64))) for v in variables]
