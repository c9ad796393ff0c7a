"""Keras' files of weights, for the command `convert`."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from hvd_slowmo.checkpoint.bounded_json import MAX_LENGTH
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
        """Return the values of a .keras or .weights.h5 file, by the tensors' names. Nothing in it is executed."""
        try:
            if path.name.endswith(".keras"):
                _refuse_code(path)
            self._model.load_weights(path)
        except CommandError:
            raise
        except Exception as error:  # Keras lets through anything that the libraries raise about a damaged file
            raise CommandError(
                f"{path} does not fill the Keras model: it is damaged, or of another model: {spell_error(error)}"
            ) from error
        return read_keras(self._variables, self.tensors.specs)

    def write(self, values: Arrays, path: Path) -> None:
        """Write a .keras or .weights.h5 file of these values."""
        write_keras(self._variables, self.tensors.specs, values)
        replace_atomically(path, self._model.save if path.name.endswith(".keras") else self._model.save_weights)


def _refuse_code(path: Path) -> None:
    """Refuse a model file that holds code. Weights alone are taken from it, but nobody should pass it on.

    Raises:
        CommandError: it has a Lambda, or pickled objects among its weights.
        zipfile.BadZipFile: it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        if "config.json" in archive.namelist():
            if archive.getinfo("config.json").file_size > MAX_LENGTH:
                raise CommandError(f"{path} has a config of more than {MAX_LENGTH} bytes.")
            if re.search(rb'"class_name":\s*"(Lambda|__lambda__)"', archive.read("config.json")):
                raise CommandError(
                    f"{path} has a Lambda, which is Python code, and Keras' safe mode loads none from a file. Convert "
                    "weights alone, which Keras' save_weights writes to a .weights.h5 file."
                )
        for name in archive.namelist():
            if name.endswith(".npz"):
                with archive.open(name) as file, np.load(file, allow_pickle=False) as arrays:
                    _refuse_objects(path, arrays)


def _refuse_objects(path: Path, arrays: Any) -> None:
    for name in arrays.files:
        try:
            arrays[name]
        except ValueError as error:
            raise CommandError(f"{path} has {name!r}, which is no array without pickled objects: {error}") from error
