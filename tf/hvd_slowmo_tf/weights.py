"""A Keras model's values as those of the wire, and back: whole tensors, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.wire import WireEntry


def read_keras(
    model: Any, entries: Sequence[WireEntry], gradients: Mapping[str, Any] | None = None
) -> dict[str, NDArray[Any]]:
    """The values of the entries by their names: of the wire's shapes. bfloat16 comes as float32.

    Args:
        gradients: by path, to be read in place of the values.
    """
    own = {path: v.value for path, v in variables_of(model).items()} if gradients is None else gradients
    return {entry.name: entry.view.to_wire(_array(own[entry.own])) for entry in entries}


def write_keras(model: Any, entries: Sequence[WireEntry], values: Mapping[str, NDArray[Any]]) -> None:
    """Give the model the values of `read_keras`, or of its like on another framework, in place."""
    own = variables_of(model)
    for entry in entries:
        variable = own[entry.own]
        variable.assign(entry.view.to_own(values[entry.name], _array(variable.value)))


def variables_of(model: Any) -> dict[str, Any]:
    """All variables by their paths."""
    return {variable.path: variable for variable in model.variables}


def _array(tensor: Any) -> NDArray[Any]:
    array: NDArray[Any] = np.asarray(tensor)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
