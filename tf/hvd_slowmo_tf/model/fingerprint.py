"""Values that a model is given from outside between two trainings: loaded weights, or Keras' moving average."""

from __future__ import annotations

import keras
import tensorflow as tf


class Fingerprint:
    """A number for each trained variable, which other values would change, and the steps at which it was taken.

    It is of this process. `SlowMo.worker.variables.entered` carries what a saved state has to tell the next one.

    Args:
        optimizer: SlowMo, built before anything is taken.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self._optimizer = optimizer
        self._taken: tuple[int, list[float]] | None = None

    def take(self) -> None:
        """Take the fingerprint of the variables as they are."""
        self.forget()
        self._taken = self._optimizer.steps, self._norms()

    def take_unless_entered(self) -> None:
        """Take it, but where the variables were given other values since: the next start will tell of these."""
        if not self.differs():
            self.take()

    def forget(self) -> None:
        """Take any values as they are from now on."""
        self._taken = None
        if self._optimizer.built:  # else it has no variables, and has told of nothing
            self._optimizer.worker.variables.entered.assign(-1)

    def note(self) -> None:
        """Note in SlowMo's variables what the next start is to be told: they are about to be saved."""
        self._optimizer.worker.variables.entered.assign(self._optimizer.steps if self.differs() else -1)

    def follow_note(self) -> None:
        """Go by the note from now on: SlowMo's variables and the model's were loaded together."""
        self._taken = None

    def differs(self) -> bool:
        """Return whether the variables have other values than when it was taken, without a step in between."""
        steps = self._optimizer.steps
        if self._optimizer.worker.variables.entered == steps:
            return True
        return self._taken is not None and self._taken[0] == steps and self._taken[1] != self._norms()

    def _norms(self) -> list[float]:
        return [float(tf.norm(tf.cast(v, tf.float64))) for v in self._optimizer._trainable_variables]
