"""A PyTorch model's values in the wire's form, and back: whole tensors, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hvd_slowmo.wire.tensors import TensorSpec


def read_torch(model: nn.Module, specs: Sequence[TensorSpec], gradients: bool = False) -> dict[str, NDArray[Any]]:
    """Return values, or gradients, by the tensors' names on the wire and in its shapes; bfloat16 as float32.

    A parameter without a gradient has a gradient of zeros.

    Example:
        >>> from hvd_slowmo_torch.interop.layers import entries_torch
        >>> model = nn.Linear(2, 1)
        >>> sorted(read_torch(model, entries_torch(model)))
        ['0.linear.bias', '0.linear.weight']
    """
    tensors = tensors_of(model)
    return {spec.name: spec.view.to_wire(_array(tensors[spec.own], gradients)) for spec in specs}


def write_torch(model: nn.Module, specs: Sequence[TensorSpec], values: Mapping[str, NDArray[Any]]) -> None:
    """Set the model's values, in place, to those of `read_torch` or of its counterpart on another framework."""
    tensors = tensors_of(model)
    with torch.no_grad():
        for spec in specs:
            tensor = tensors[spec.own]
            value = spec.view.to_own(values[spec.name], _array(tensor, False))
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(value)))


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by their names; one in several places has several."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a tensor's values, in the tensor's memory where possible; bfloat16 as float32."""
    detached = tensor.detach()
    array: NDArray[Any] = (detached.float() if detached.dtype == torch.bfloat16 else detached).cpu().numpy()
    return array


def _array(tensor: torch.Tensor, gradient: bool) -> NDArray[Any]:
    source = tensor.grad if gradient else tensor
    return array_of(torch.zeros_like(tensor) if source is None else source)
