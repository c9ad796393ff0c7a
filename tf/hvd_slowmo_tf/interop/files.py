"""Keras' files of weights, for the command `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hvd_slowmo.checkpoint.file import Arrays, atomically
from hvd_slowmo.cli.arguments import Wrong, spell_error
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_tf.checkpoint import named_variables
from hvd_slowmo_tf.interop.weights import read_keras, write_keras


class KerasFiles:
    """A model, which files fill and which is written into files.

    Raises:
        Wrong: whatever is the matter with a file.
    """

    def __init__(self, model: Any, parameter_map: ParameterMap | None) -> None:
        self._model = model
        self.named, self._variables = named_variables(model, parameter_map)

    def read(self, path: Path) -> Arrays:
        """The values of a .keras or .weights.h5 file, by the names of the entries."""
        try:
            self._model.load_weights(path)
        except Exception as error:  # of a damaged file Keras lets through whatever the libraries raise
            raise Wrong(
                f"{path} does not fill the Keras model: it is damaged, or of another model: {spell_error(error)}"
            ) from error
        return read_keras(self._variables, self.named.entries)

    def write(self, values: Arrays, path: Path) -> None:
        """A .keras or .weights.h5 file of these values."""
        write_keras(self._variables, self.named.entries, values)
        atomically(path, self._model.save if path.name.endswith(".keras") else self._model.save_weights)
