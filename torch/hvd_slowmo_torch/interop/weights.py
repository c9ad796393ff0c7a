"""A PyTorch model's values as those of the wire, and back: whole tensors, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hvd_slowmo.wire.tensors import TensorSpec


def read_torch(model: nn.Module, entries: Sequence[TensorSpec], gradients: bool = False) -> dict[str, NDArray[Any]]:
    """The values, or the gradients, of the entries by their names: of the wire's shapes. bfloat16 comes as float32.

    A parameter without a gradient has a gradient of zeros.
    """
    own = tensors_of(model)
    return {entry.name: entry.view.to_wire(_array(own[entry.own], gradients)) for entry in entries}


def write_torch(model: nn.Module, entries: Sequence[TensorSpec], values: Mapping[str, NDArray[Any]]) -> None:
    """Give the model the values of `read_torch`, or of its like on another framework, in place."""
    own = tensors_of(model)
    with torch.no_grad():
        for entry in entries:
            tensor = own[entry.own]
            value = entry.view.to_own(values[entry.name], _array(tensor, False))
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(value)))


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by their names; one that is in several places has several."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor's values, in its own memory where that is possible. bfloat16 comes as float32."""
    found = tensor.detach()
    array: NDArray[Any] = (found.float() if found.dtype == torch.bfloat16 else found).cpu().numpy()
    return array


def _array(tensor: torch.Tensor, gradient: bool) -> NDArray[Any]:
    found = tensor.grad if gradient else tensor
    return array_of(torch.zeros_like(tensor) if found is None else found)
