"""Values that a model is given from outside between two trainings: loaded weights, or Keras' moving average."""

from __future__ import annotations

import keras
import tensorflow as tf


class Fingerprint:
    """A number for each trained variable, which other values would change, and the steps at which it was taken.

    It is of this process. `SlowMo.worker.variables.entered` carries to the next one what its start has to be told.

    Args:
        optimizer: SlowMo, built before anything is taken.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self._optimizer = optimizer
        self._taken: tuple[int, list[float]] | None = None
        self._ended = False

    def take(self) -> None:
        """Take the fingerprint of the variables as they are."""
        self.forget()
        self._taken = self._optimizer.steps, self._norms()

    def joined(self, entered: bool, leaving: bool) -> None:
        """Take it after a join.

        Args:
            entered: the variables were given other values before it, Keras' moving average at the end of fit() say; the
                next start will tell of these.
            leaving: the training has ended with the join.
        """
        if not entered:
            self.take()
        if leaving:
            self.end()

    def end(self) -> None:
        """Mark the end of a training: values that are given from now on are no part of it."""
        self._ended = True

    def forget(self) -> None:
        """Take any values as they are from now on, in a training that goes on."""
        self._taken, self._ended = None, False
        if self._optimizer.built:  # else it has no variables, and has told of nothing
            self._optimizer.worker.variables.entered.assign(-1)

    def follow_loaded(self) -> None:
        """Go by the loaded word from now on: SlowMo's variables and the model's were loaded together."""
        self._taken = None

    def differs(self) -> bool:
        """Return whether the variables have other values than when it was taken, without a step in between."""
        steps = self._optimizer.steps
        if self._taken is None:
            return bool(self._optimizer.worker.variables.entered == steps)
        return self._taken[0] == steps and self._taken[1] != self._norms()

    def told(self) -> int:
        """Return what a state that is saved now tells: the steps, where a start would begin anew; else -1.

        In a training that goes on nothing is told: what a callback changes between two epochs is a part of it.
        """
        tells = self._optimizer.built and (self._ended or self._taken is None) and self.differs()
        return self._optimizer.steps if tells else -1

    def _norms(self) -> list[float]:
        return [float(tf.norm(tf.cast(v, tf.float64))) for v in self._optimizer._trainable_variables]
