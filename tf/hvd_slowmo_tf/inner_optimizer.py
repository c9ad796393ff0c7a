"""The optimizer within: what SlowMo takes over from it, and the buffers that are reset or averaged."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf


class Inner:
    """A Keras optimizer, alone or in a LossScaleOptimizer, that takes the base steps.

    What counts steps from outside moves to SlowMo, so that a reset can't touch it and overflowed steps count: the
    learning rate's schedule, gradient accumulation and the moving average of the weights. `taken` is what moved, as
    keyword arguments of keras.optimizers.Optimizer.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        self.innermost = optimizer.inner_optimizer if scaled else optimizer
        self._known = not optimizer.built  # whether its values at build are those from before the first step
        self._initial: list[tuple[Any, Any]] = []
        if optimizer.built and (self.innermost.use_ema or self.innermost.gradient_accumulation_steps):
            raise ValueError(
                f"{type(self.innermost).__name__} has been built with use_ema or gradient_accumulation_steps, which "
                "SlowMo takes over. Wrap it before it is built or used."
            )
        moved = ("gradient_accumulation_steps", "use_ema", "ema_momentum", "ema_overwrite_frequency")
        rate = self.innermost._learning_rate
        self.taken: dict[str, Any] = {name: getattr(self.innermost, name) for name in moved}
        self.taken["learning_rate"] = float(rate.numpy()) if isinstance(rate, keras.Variable) else rate
        if not isinstance(rate, keras.Variable):
            self.innermost._learning_rate = keras.Variable(
                0.0, dtype=keras.config.floatx(), trainable=False, name="learning_rate"
            )
        self.innermost.gradient_accumulation_steps = None
        self.innermost.use_ema = False

    def build(self, variables: list[Any], reset: bool) -> None:
        """Make its variables. reset: their values of before the first step will be needed."""
        with tf.init_scope():
            if not self.optimizer.built:
                self.optimizer.build(variables)
            if reset:
                self._initial = self._initial_values(variables)

    def _initial_values(self, variables: list[Any]) -> list[tuple[Any, Any]]:
        fresh = self.innermost
        if not self._known:
            fresh = type(self.innermost).from_config(self.innermost.get_config())
            fresh.build(variables)
        values = [v.numpy() for v in fresh.variables if v is not fresh._learning_rate]
        own = [v for v in self.innermost.variables if v is not self.innermost._learning_rate]
        # One number each, as a rule: nothing of the variable's size is kept.
        return [(v, x.flat[0] if x.size and (x == x.flat[0]).all() else x) for v, x in zip(own, values, strict=True)]

    def reset(self) -> None:
        """In a trace: buffers and the step of their bias correction as before the first step; rates stay."""
        for v, x in self._initial:
            v.assign(tf.broadcast_to(tf.cast(np.asarray(x), v.dtype), v.shape))

    @property
    def buffers(self) -> list[Any]:
        """Its floating-point variables that accumulate something."""
        rate = self.innermost._learning_rate
        return [v for v in self.innermost.variables if v is not rate and tf.as_dtype(v.dtype).is_floating]

    def set_rate(self, rate: Any) -> None:
        """In a trace: the learning rate of the next step."""
        self.innermost._learning_rate.assign(tf.cast(rate, self.innermost._learning_rate.dtype))

    def serialized(self, rate: Any) -> dict[str, Any]:
        """The optimizer as it was given, with what has moved, for a model file. rate: as Keras serializes it."""
        found: dict[str, Any] = keras.saving.serialize_keras_object(self.optimizer)
        innermost = (
            found["config"] if self.optimizer is self.innermost else found["config"]["inner_optimizer"]["config"]
        )
        innermost.update({**self.taken, "learning_rate": rate})
        return found
