"""Keras variables as bytes, for the workers that do not have their values."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core.start.bulk import Body, WholeArray
from hvd_slowmo_tf.model.layout import VariableRef
from hvd_slowmo_tf.worker import KerasWorker


class KerasCarrier:
    """`hvd_slowmo.core.start.bulk.Carrier` of Keras variables.

    Args:
        worker: of the optimizer, assembled.
    """

    def __init__(self, worker: KerasWorker) -> None:
        self._worker = worker
        self._sums: dict[str, Any] = {}  # per name, the traced function that sums under it

    def sum_words(self, comm: ScopedComm, name: str, words: NDArray[np.int64]) -> NDArray[np.int64]:
        if name not in self._sums:
            traced = tf.function(
                lambda x: comm.wait(comm.start_sum(name, x)),
                input_signature=[tf.TensorSpec([None], tf.int64)],
                autograph=False,
            )
            self._sums[name] = traced.get_concrete_function()
        total: NDArray[np.int64] = self._worker.call(self._sums[name], tf.constant(words)).numpy()
        return total

    def body(self, item: Any) -> Body | None:
        return None  # all tensors are variables, which every worker has

    def new(self, dtype: str, shape: tuple[int, ...]) -> Any:
        raise AssertionError("body() has never taken a tensor")


def in_place(variable: keras.Variable) -> Body:
    """Return a variable as bytes."""
    dtype = tf.as_dtype(variable.dtype).as_numpy_dtype
    return WholeArray(dtype, tuple(variable.shape), variable.numpy, variable.assign)


def on_wire(ref: VariableRef) -> Body:
    """Return a tensor of a ParameterMap in the wire's form; bfloat16 as float32."""
    spec, variable = ref.spec, ref.variable

    def put(values: NDArray[Any]) -> None:
        variable.assign(spec.view.to_own(values, variable.numpy()))

    dtype = "float32" if spec.dtype == "bfloat16" else spec.dtype
    return WholeArray(dtype, spec.shape, lambda: spec.view.to_wire(variable.numpy()), put)
