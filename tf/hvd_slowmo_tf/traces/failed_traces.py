"""Repairs after a trace that has failed: of Keras' train function, and of variables that were made in the trace."""

from __future__ import annotations

import sys
from types import FrameType

import keras

from hvd_slowmo_tf.model.layout import native


def drop_train_functions() -> None:
    """Drop the train functions of the models whose training is being traced; called where the trace is refused.

    TensorFlow keeps a failed trace that has made variables: from then on the function does nothing, and a
    `train_on_batch` after the error would train nothing without a word. Keras makes a dropped function anew. A model's
    optimizer does not know the model, but it is the model's train step that calls it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.Model):
            caller.train_function = None
        frame = frame.f_back


def without_values(variables: list[keras.Variable]) -> list[keras.Variable]:
    """Return the variables that have no values: the trace that was to initialize them has failed.

    Example:
        >>> without_values([keras.Variable([1.0])])
        []
    """
    return [v for v in variables if not native(v).is_initialized()]


def initialize(model: keras.Model) -> None:
    """Give initial values to the variables of a model's layers that have none, from another layer of the same config.

    Args:
        model: some variables of which may have been made in a trace that has failed.

    Raises:
        NotImplementedError: a custom layer with such variables has no `get_config`.
        ValueError: a layer makes other variables than those that it has.
    """
    for layer in model._flatten_layers():
        own = [*layer._trainable_variables, *layer._non_trainable_variables]
        if not without_values(own):
            continue
        other = type(layer).from_config(layer.get_config())
        other.build_from_config(layer.get_build_config())
        for v, fresh in zip(own, [*other._trainable_variables, *other._non_trainable_variables], strict=True):
            v.assign(fresh)
