"""Copying a model's values between PyTorch and Keras, where both are installed."""

from __future__ import annotations

from typing import Any

from hvd_slowmo.wire.parameter_map import ParameterMap, pair

# The adapters are imported within functions, so that this module can be imported without a framework. PyTorch comes
# first: the other way round its libraries may not load.


def copy_to_keras(torch_model: Any, keras_model: Any, parameter_map: ParameterMap | None = None) -> None:
    """Set a Keras model's values to those of a PyTorch model. Equal types make the copy exact.

    Args:
        parameter_map: None for the automatic one.

    Raises:
        ValueError: the models don't match; the message has the first difference, and neither model is changed.

    Example:
        >>> import torch, keras
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> copy_to_keras(torch.nn.Linear(2, 1), model)
    """
    from hvd_slowmo_torch.interop.layers import entries_torch
    from hvd_slowmo_torch.interop.weights import read_torch

    # isort: split
    from hvd_slowmo_tf.interop.layers import entries_keras
    from hvd_slowmo_tf.interop.weights import variables_of, write_keras

    torch_specs, keras_specs = entries_torch(torch_model, parameter_map), entries_keras(keras_model, parameter_map)
    list(pair(torch_specs, keras_specs))
    write_keras(variables_of(keras_model), keras_specs, read_torch(torch_model, torch_specs))


def copy_to_torch(keras_model: Any, torch_model: Any, parameter_map: ParameterMap | None = None) -> None:
    """Set a PyTorch model's values to those of a Keras model; see `copy_to_keras`.

    Example:
        >>> import torch, keras
        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> copy_to_torch(model, torch.nn.Linear(2, 1))
    """
    from hvd_slowmo_torch.interop.layers import entries_torch
    from hvd_slowmo_torch.interop.weights import write_torch

    # isort: split
    from hvd_slowmo_tf.interop.layers import entries_keras
    from hvd_slowmo_tf.interop.weights import read_keras, variables_of

    torch_specs, keras_specs = entries_torch(torch_model, parameter_map), entries_keras(keras_model, parameter_map)
    list(pair(torch_specs, keras_specs))
    write_torch(torch_model, torch_specs, read_keras(variables_of(keras_model), keras_specs))
