"""PyTorch's files of weights, for the command `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvd_slowmo.checkpoint.file import Arrays, replace_atomically
from hvd_slowmo.errors import CommandError, spell_error
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_torch.checkpoint import name_model
from hvd_slowmo_torch.interop.weights import array_of, read_torch, write_torch


class TorchFiles:
    """A PyTorch model, into which files are read and from which they are written.

    Attributes:
        tensors: of the model, by their names in a checkpoint.

    Raises:
        CommandError: a file can't be read, or is of another model.

    Example:
        >>> files = TorchFiles(nn.Linear(2, 1), None)
        >>> [spec.name for spec in files.tensors.specs]
        ['0.linear.weight', '0.linear.bias']
    """

    def __init__(self, model: nn.Module, parameter_map: ParameterMap | None) -> None:
        self._model = model
        self.tensors = name_model(model, parameter_map)

    def read(self, path: Path) -> Arrays:
        """Return the values of a state_dict's file, by the tensors' names."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may raise anything
            raise CommandError(f"{path} is no file of PyTorch with tensors alone: {spell_error(error)}") from error
        tensors = isinstance(state, dict) and all(isinstance(x, torch.Tensor) for x in state.values())
        if not tensors or not all(isinstance(name, str) for name in state):
            raise CommandError(f"{path} is no state_dict of a model: not all of its entries are tensors.")
        return self._load(state, path)

    def read_arrays(self, values: Arrays, path: Path) -> Arrays:
        """Return the values of a file that has PyTorch's names and arrays, by the tensors' names."""
        return self._load({name: torch.tensor(value) for name, value in values.items()}, path)

    def write(self, values: Arrays, path: Path) -> None:
        """Write a state_dict of these values."""
        state = self._state(values)

        def save(temporary: Path) -> None:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # from PyTorch's own writer, on a full disk for instance
                raise OSError(f"{path} can't be written: {error}") from error

        replace_atomically(path, save)

    def arrays(self, values: Arrays) -> Arrays:
        """Return the values by PyTorch's names, a tied tensor under the first in order only, as safetensors does."""
        state = self._state(values)
        extra = {name for names in self._tied() for name in names[1:]}
        return {name: array_of(x).copy() for name, x in state.items() if name not in extra}

    def _tied(self) -> list[list[str]]:
        """Return the names of each tensor that has several, sorted."""
        names: dict[int, list[str]] = {}
        for name, tensor in sorted(self._model.state_dict(keep_vars=True).items()):
            names.setdefault(id(tensor), []).append(name)
        return [same for same in names.values() if len(same) > 1]

    def _load(self, state: dict[str, torch.Tensor], path: Path) -> Arrays:
        for names in self._tied():
            present = [name for name in names if name in state]
            state = {**state, **{name: state[present[0]] for name in names if present and name not in state}}
        try:
            self._model.load_state_dict(state)
        except Exception as error:  # a strange name or type may raise anything
            raise CommandError(f"{path} is of another model: {error}") from error
        return read_torch(self._model, self.tensors.specs)

    def _state(self, values: Arrays) -> dict[str, Any]:
        write_torch(self._model, self.tensors.specs, values)
        return self._model.state_dict()
