"""The inner optimizer: the settings that SlowMo takes over from it, and its state, which is reset or averaged."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray


class InnerOptimizer:
    """A Keras optimizer, alone or in a LossScaleOptimizer, that takes the inner steps.

    The settings that depend on a count of steps move to SlowMo, so that a reset can't touch them and steps that
    overflowed count: the learning rate with its schedule, gradient accumulation, and the moving average of the weights.

    Attributes:
        optimizer: as the user gave it.
        innermost: the optimizer within its LossScaleOptimizer, if it has one.
        moved: the settings that have moved, as keyword arguments of keras.optimizers.Optimizer.

    Raises:
        ValueError: the optimizer has been built with a setting that moves.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self.optimizer = optimizer
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        self.innermost: keras.optimizers.Optimizer = optimizer.inner_optimizer if scaled else optimizer
        self._fresh = not optimizer.built  # then its values at build are those from before the first step
        self._initial: list[tuple[keras.Variable, Any]] = []
        if optimizer.built and (self.innermost.use_ema or self.innermost.gradient_accumulation_steps):
            raise ValueError(
                f"{type(self.innermost).__name__} has been built with use_ema or gradient_accumulation_steps, which "
                "SlowMo takes over. Wrap it before it is built or used."
            )
        names = ("gradient_accumulation_steps", "use_ema", "ema_momentum", "ema_overwrite_frequency")
        rate = self.innermost._learning_rate
        self.moved: dict[str, Any] = {name: getattr(self.innermost, name) for name in names}
        self.moved["learning_rate"] = float(rate.numpy()) if isinstance(rate, keras.Variable) else rate
        if not isinstance(rate, keras.Variable):
            self.innermost._learning_rate = keras.Variable(
                0.0, dtype=keras.config.floatx(), trainable=False, name="learning_rate"
            )
        self.innermost.gradient_accumulation_steps = None
        self.innermost.use_ema = False
        # Its sum over the replicas of a tf.distribute strategy, which SlowMo refuses, is a custom gradient, and
        # TensorFlow keeps the whole trace around one for ever. Not by setattr, which Keras tracks.
        vars(self.innermost)["_all_reduce_sum_gradients"] = _of_one_replica

    def build(self, variables: list[keras.Variable], reset: bool) -> None:
        """Make the optimizer's variables; with `reset`, remember their values from before the first step."""
        with tf.init_scope():
            if not self.optimizer.built:
                self.optimizer.build(variables)
            if reset:
                self._initial = self._initial_values(variables)

    def show_averages(self, averages: list[keras.Variable]) -> None:
        """Let Keras' SwapEMAWeights find the moving average of the weights, which it looks for in here."""
        vars(self.optimizer)["_model_variables_moving_average"] = averages  # setattr would track them twice

    def reset(self) -> None:
        """Give the state, and the step of its bias correction, its values from before the first step; in a trace."""
        for v, value in self._initial:
            v.assign(tf.broadcast_to(tf.cast(np.asarray(value), v.dtype), v.shape))

    @property
    def state(self) -> list[keras.Variable]:
        """All variables but the learning rate."""
        return _state(self.innermost)

    @property
    def floating_state(self) -> list[keras.Variable]:
        """The part of the state that can be averaged."""
        return [v for v in self.state if tf.as_dtype(v.dtype).is_floating]

    def slots_of(self, number: int, count: int) -> list[keras.Variable]:
        """Return the state that belongs to one of the trained variables alone: its momentum, say.

        Args:
            number: of the variable.
            count: number of trained variables.
        """
        state = {id(v) for v in self.state}
        attributes = [each for name, each in vars(self.innermost).items() if name != "_variables"]
        lists = [each for each in attributes if isinstance(each, list) and len(each) == count]
        return [each[number] for each in lists if id(each[number]) in state]

    def set_rate(self, rate: tf.Tensor) -> None:
        """Set the learning rate of the next step; in a trace."""
        self.innermost._learning_rate.assign(tf.cast(rate, self.innermost._learning_rate.dtype))

    def serialized(self, rate: Any) -> dict[str, Any]:
        """Return the optimizer as it was given for a model file; `rate` is the learning rate as Keras serializes it."""
        found: dict[str, Any] = keras.saving.serialize_keras_object(self.optimizer)
        alone = self.optimizer is self.innermost
        innermost = found["config"] if alone else found["config"]["inner_optimizer"]["config"]
        innermost.update({**self.moved, "learning_rate": rate})
        return found

    def _initial_values(self, variables: list[keras.Variable]) -> list[tuple[keras.Variable, Any]]:
        fresh = self.innermost
        if not self._fresh:
            fresh = type(self.innermost).from_config(self.innermost.get_config())
            fresh.build(variables)
        return [(v, _short(other.numpy())) for v, other in zip(self.state, _state(fresh), strict=True)]


def _state(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    return [v for v in optimizer.variables if v is not optimizer._learning_rate]


def _of_one_replica(gradients: Any) -> Any:
    return gradients


def _short(values: NDArray[Any]) -> Any:
    """Return one number where all elements are equal, as they mostly are: nothing of a variable's size is kept."""
    return values.flat[0] if values.size and (values == values.flat[0]).all() else values
