"""PyTorch's files of weights, for the command `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvd_slowmo.checkpoint.file import Arrays, atomically
from hvd_slowmo.cli.arguments import Wrong, spell_error
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_torch.checkpoint import named
from hvd_slowmo_torch.interop.weights import array_of, read_torch, write_torch


class TorchFiles:
    """A model, which files fill and which is written into files.

    Raises:
        Wrong: whatever is the matter with a file.
    """

    def __init__(self, model: nn.Module, parameter_map: ParameterMap | None) -> None:
        self._model = model
        self.named = named(model, parameter_map)

    def read(self, path: Path) -> Arrays:
        """The values of a state_dict, by the names of the entries."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of a damaged file it raises whatever the bytes lead to
            raise Wrong(f"{path} is no file of PyTorch with tensors alone: {spell_error(error)}") from error
        tensors = isinstance(state, dict) and all(isinstance(x, torch.Tensor) for x in state.values())
        if not tensors or not all(isinstance(name, str) for name in state):
            raise Wrong(f"{path} is no state_dict of a model: not all it has are tensors.")
        return self._filled(state, path)

    def read_arrays(self, values: Arrays, path: Path) -> Arrays:
        """Of a file with PyTorch's names and arrays."""
        return self._filled({name: torch.tensor(value) for name, value in values.items()}, path)

    def write(self, values: Arrays, path: Path) -> None:
        """A state_dict of these values."""
        state = self._state(values)
        atomically(path, lambda place: torch.save(state, place))

    def arrays(self, values: Arrays) -> Arrays:
        """The same by PyTorch's names, as arrays."""
        return {name: array_of(x).copy() for name, x in self._state(values).items()}

    def _filled(self, state: dict[str, Any], path: Path) -> Arrays:
        try:
            self._model.load_state_dict(state)
        except RuntimeError as error:
            raise Wrong(f"{path} is of another model: {error}") from error
        return read_torch(self._model, self.named.entries)

    def _state(self, values: Arrays) -> dict[str, Any]:
        write_torch(self._model, self.named.entries, values)
        return self._model.state_dict()
