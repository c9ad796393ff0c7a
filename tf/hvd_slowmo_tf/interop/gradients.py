"""Outputs and gradients of a Keras model: its half of `hvd_slowmo.interop.compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hvd_slowmo.wire.tensors import TensorSpec
from hvd_slowmo_tf.interop.weights import read_keras

Array = NDArray[Any]


def outputs_and_gradients(
    model: Any, specs: Sequence[TensorSpec], inputs: Sequence[Array], weights: Array, transposed: bool | None
) -> tuple[Array, dict[str, Array]]:
    """Return the outputs of a batch in PyTorch's orientation, and the gradients of the weighted sum.

    Args:
        weights: of the shape of PyTorch's outputs.
        transposed: PyTorch has the outputs channels first; None: it does where the shapes differ.

    Raises:
        ValueError: the outputs have another shape than PyTorch's.
    """
    with tf.GradientTape() as tape:
        outputs = model([tf.constant(x) for x in inputs] if len(inputs) > 1 else inputs[0], training=False)
        outputs = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        outputs = keras.ops.convert_to_tensor(outputs)
        shape = tuple(outputs.shape)
        transposed = shape != weights.shape if transposed is None else transposed
        if (_shape_first(shape) if transposed else shape) != weights.shape:
            raise ValueError(f"PyTorch's output has shape {weights.shape}, Keras' {shape}.")
        weights = np.moveaxis(weights, 1, -1) if transposed else weights
        total = tf.reduce_sum(outputs * tf.constant(weights, outputs.dtype))
    trained = model.trainable_variables
    gradients = tape.gradient(total, [v.value for v in trained], unconnected_gradients="zero")
    by_path = {v.path: tf.convert_to_tensor(g) for v, g in zip(trained, gradients, strict=True)}
    values = outputs.numpy()
    return channels_first(values) if transposed else values, read_keras(by_path, specs)


def channels_first(x: Array) -> Array:
    """Return, as PyTorch has it, an array that Keras has channels last.

    Example:
        >>> channels_first(np.zeros((8, 5, 6, 3))).shape
        (8, 3, 5, 6)
    """
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def _shape_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) < 2 else (shape[0], shape[-1], *shape[1:-1])
