"""Helpers for the tests of the Keras adapter's contract."""

import keras
import numpy as np
import tensorflow as tf

# Several workers' graphs wait in this process's threads at once; with fewer threads than workers they would wait for
# each other forever. Set before TensorFlow starts its threads.
tf.config.threading.set_inter_op_parallelism_threads(16)

SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam
Scaled = keras.optimizers.LossScaleOptimizer


def applied(optimizer, steps=5):
    """Return a matrix and a vector after each step with the same gradients, in a traced loop."""
    rng = np.random.default_rng(1)
    variables = [keras.Variable(rng.normal(size=shape), dtype="float32") for shape in ((3, 2), (4,))]
    optimizer.build(variables)  # in a trace ScheduleFreeAdamW would restart in every step

    @tf.function(autograph=False)
    def step(*grads):
        optimizer.apply_gradients(zip(grads, variables, strict=True))

    history = []
    for _ in range(steps):
        step(*[tf.constant(rng.normal(size=v.shape), tf.float32) for v in variables])
        history.append([v.numpy() for v in variables])
    return history


def decay():
    return keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
