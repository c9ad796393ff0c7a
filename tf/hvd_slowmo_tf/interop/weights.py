"""A Keras model's values in the wire's form, and back: whole tensors, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.wire.tensors import TensorSpec


def read_keras(variables: Mapping[str, Any], specs: Sequence[TensorSpec]) -> dict[str, NDArray[Any]]:
    """Return values by the variables' names on the wire and in its shapes; bfloat16 as float32.

    Args:
        variables: by the specs' own names; or tensors in their place.

    Example:
        >>> import keras
        >>> from hvd_slowmo_tf.interop.layers import entries_keras
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> sorted(read_keras(variables_of(model), entries_keras(model)))
        ['0.linear.bias', '0.linear.weight']
    """
    return {spec.name: spec.view.to_wire(array_of(variables[spec.own])) for spec in specs}


def write_keras(variables: Mapping[str, Any], specs: Sequence[TensorSpec], values: Mapping[str, NDArray[Any]]) -> None:
    """Set the variables, in place, to the values of `read_keras` or of its counterpart on another framework."""
    for spec in specs:
        variable = variables[spec.own]
        variable.assign(spec.view.to_own(values[spec.name], array_of(variable)))


def variables_of(model: Any) -> dict[str, Any]:
    """Return all variables by their paths."""
    return {variable.path: variable for variable in model.variables}


def array_of(variable: Any) -> NDArray[Any]:
    """Return a variable's or a tensor's values; bfloat16 as float32."""
    array: NDArray[Any] = np.asarray(variable.numpy() if hasattr(variable, "numpy") else variable)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
