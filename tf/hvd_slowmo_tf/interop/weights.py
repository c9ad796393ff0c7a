"""A Keras model's values as those of the wire, and back: whole tensors, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.wire.tensors import TensorSpec


def read_keras(own: Mapping[str, Any], entries: Sequence[TensorSpec]) -> dict[str, NDArray[Any]]:
    """The values of the entries by their names: of the wire's shapes. bfloat16 comes as float32.

    Args:
        own: variables, or tensors in their place, by the entries' own names.
    """
    return {entry.name: entry.view.to_wire(array_of(own[entry.own])) for entry in entries}


def write_keras(own: Mapping[str, Any], entries: Sequence[TensorSpec], values: Mapping[str, NDArray[Any]]) -> None:
    """Give the variables the values of `read_keras`, or of its like on another framework, in place."""
    for entry in entries:
        variable = own[entry.own]
        variable.assign(entry.view.to_own(values[entry.name], array_of(variable)))


def variables_of(model: Any) -> dict[str, Any]:
    """All variables by their paths."""
    return {variable.path: variable for variable in model.variables}


def array_of(variable: Any) -> NDArray[Any]:
    """A variable's or a tensor's values. bfloat16 comes as float32."""
    array: NDArray[Any] = np.asarray(variable.numpy() if hasattr(variable, "numpy") else variable)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
