"""Copying a model's values between frameworks, where both are installed."""

from __future__ import annotations

from typing import Any

from hvd_slowmo.wire.parameter_map import ParameterMap, pair

# The adapters are imported where they are used: a core without frameworks can still import this.


def copy_to_keras(torch_model: Any, keras_model: Any, parameter_map: ParameterMap | None = None) -> None:
    """Give a Keras model the values of a PyTorch model. Equal types make it exact.

    Args:
        parameter_map: None for the automatic one.

    Raises:
        ValueError: models that don't match, with the first difference; neither is changed.
    """
    # PyTorch first: the other way round its libraries may not load.
    from hvd_slowmo_torch.interop.layers import entries_torch
    from hvd_slowmo_torch.interop.weights import read_torch

    # isort: split
    from hvd_slowmo_tf.interop.layers import entries_keras
    from hvd_slowmo_tf.interop.weights import variables_of, write_keras

    ours, theirs = entries_torch(torch_model, parameter_map), entries_keras(keras_model, parameter_map)
    list(pair(ours, theirs))
    write_keras(variables_of(keras_model), theirs, read_torch(torch_model, ours))


def copy_to_torch(keras_model: Any, torch_model: Any, parameter_map: ParameterMap | None = None) -> None:
    """Give a PyTorch model the values of a Keras model: `copy_to_keras` the other way round."""
    from hvd_slowmo_torch.interop.layers import entries_torch
    from hvd_slowmo_torch.interop.weights import write_torch

    # isort: split
    from hvd_slowmo_tf.interop.layers import entries_keras
    from hvd_slowmo_tf.interop.weights import read_keras, variables_of

    ours, theirs = entries_torch(torch_model, parameter_map), entries_keras(keras_model, parameter_map)
    list(pair(ours, theirs))
    write_torch(torch_model, ours, read_keras(variables_of(keras_model), theirs))
