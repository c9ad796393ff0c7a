"""`slowmo.measure` for Keras: a callback after every batch."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from hvd_slowmo.advice.steps import HostClock, Parameters, StepMeasurement, exchanges, refuse_constant_exchange
from hvd_slowmo.checked_numbers import integer
from hvd_slowmo_tf.optimizer import SlowMo


class MeasuringCallback(StepMeasurement, keras.callbacks.Callback):
    """Times the steps of a `fit`, or of a custom training loop; `measure` makes one."""

    def __init__(self, optimizer: keras.optimizers.Optimizer, steps: int) -> None:
        keras.callbacks.Callback.__init__(self)
        StepMeasurement.__init__(self, steps, HostClock(), partial(_size_of, optimizer))
        self._optimizer = optimizer

    def step_ended(self) -> None:
        """Note the end of a step, in a custom training loop. It waits for the device."""
        if self.done:
            return
        optimizer = self._optimizer
        if isinstance(optimizer, SlowMo) and optimizer.worker.comm.size > 1:
            self.mark(optimizer.steps, partial(exchanges, optimizer.config))
        else:
            self.mark(int(optimizer.iterations.numpy()), lambda step: False)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.skip_to_now()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.step_ended()


def measure(optimizer: keras.optimizers.Optimizer, steps: int = 50) -> MeasuringCallback:
    """Time the coming steps of an optimizer, from the end of one to the end of the next, loading of data included.

    No communication. Keras waits for every batch while a callback looks at it, and this one does so in the whole `fit`:
    give it to a short one. Steps with an exchange count apart, so that the step time is that of the computation alone.
    The time between two epochs is left out.

    Args:
        optimizer: SlowMo, or any Keras optimizer, which exchanges nothing.
        steps: number of steps to measure, after one that starts the clock. Where Keras takes several steps in one call
            (`steps_per_execution`) they are timed together, and those with an exchange tell nothing.

    Returns:
        A callback for `fit`, with `training()`, `save(path)`, `stop()` and `done`; `step_ended()` in a custom training
        loop.

    Raises:
        TypeError: `optimizer` or `steps` has another type.
        ValueError: `steps` is no positive integer, or every step of this optimizer exchanges something.

    Example:
        >>> import numpy as np
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model.compile(keras.optimizers.SGD(0.1), "mse")
        >>> measured = measure(model.optimizer, steps=5)
        >>> history = model.fit(np.ones((8, 3)), np.ones((8, 1)), batch_size=1, verbose=0, callbacks=[measured])
        >>> measured.training().parameters, measured.training().steps
        (4, 5)
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(f"`optimizer` must be a Keras optimizer. Received: {type(optimizer).__name__}")
    steps = integer("steps", steps, 1, "a positive integer")
    if isinstance(optimizer, SlowMo) and optimizer.worker.comm.size > 1:
        refuse_constant_exchange(optimizer.config)
    return MeasuringCallback(optimizer, steps)


def _size_of(optimizer: keras.optimizers.Optimizer) -> Parameters:
    variables = optimizer._trainable_variables
    sizes = [(math.prod(v.shape), max(4, tf.as_dtype(v.dtype).size)) for v in variables]
    return Parameters(sum(number for number, _ in sizes), sum(number * size for number, size in sizes))
