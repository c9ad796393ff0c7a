"""Values that a model is given from outside between two trainings: loaded weights, or Keras' moving average."""

from __future__ import annotations

import keras
import tensorflow as tf


class Fingerprint:
    """A number for each trained variable, which other values would change, and the steps at which it was taken.

    Args:
        optimizer: SlowMo, built before anything is taken.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self._optimizer = optimizer
        self._taken: tuple[int, list[float]] | None = None

    def take(self) -> None:
        """Take the fingerprint of the variables as they are."""
        self._taken = self._present()

    def take_unless_entered(self) -> None:
        """Take it, but where the variables were given other values since: the next start will tell of these."""
        if not self.differs():
            self.take()

    def forget(self) -> None:
        """Take any values as they are from now on."""
        self._taken = None

    def differs(self) -> bool:
        """Return whether the variables have other values than when it was taken, without a step in between."""
        if self._taken is None:
            return False
        present = self._present()
        return present[0] == self._taken[0] and present != self._taken

    def _present(self) -> tuple[int, list[float]]:
        trained = self._optimizer._trainable_variables
        return self._optimizer.steps, [float(tf.norm(tf.cast(v, tf.float64))) for v in trained]
