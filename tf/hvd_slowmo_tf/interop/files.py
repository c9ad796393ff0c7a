"""Keras' files of weights, for the command `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hvd_slowmo.checkpoint.file import Arrays, replace_atomically
from hvd_slowmo.errors import CommandError, spell_error
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_tf.checkpoint import name_model
from hvd_slowmo_tf.interop.weights import read_keras, write_keras


class KerasFiles:
    """A Keras model, into which files are read and from which they are written.

    Attributes:
        tensors: of the model, by their names in a checkpoint.

    Raises:
        CommandError: a file can't be read, or is of another model.

    Example:
        >>> import keras
        >>> files = KerasFiles(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), None)
        >>> [spec.name for spec in files.tensors.specs]
        ['0.linear.weight', '0.linear.bias']
    """

    def __init__(self, model: Any, parameter_map: ParameterMap | None) -> None:
        self._model = model
        self.tensors, self._variables = name_model(model, parameter_map)

    def read(self, path: Path) -> Arrays:
        """Return the values of a .keras or .weights.h5 file, by the tensors' names."""
        try:
            self._model.load_weights(path)
        except Exception as error:  # Keras lets through anything that the libraries raise about a damaged file
            raise CommandError(
                f"{path} does not fill the Keras model: it is damaged, or of another model: {spell_error(error)}"
            ) from error
        return read_keras(self._variables, self.tensors.specs)

    def write(self, values: Arrays, path: Path) -> None:
        """Write a .keras or .weights.h5 file of these values."""
        write_keras(self._variables, self.tensors.specs, values)
        replace_atomically(path, self._model.save if path.name.endswith(".keras") else self._model.save_weights)
