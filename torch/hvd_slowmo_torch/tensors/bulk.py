"""PyTorch tensors as bytes, for the workers that do not have their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core.start.bulk import Body, WholeArray
from hvd_slowmo.wire.tensors import TensorSpec
from hvd_slowmo_torch.interop.weights import read_torch, write_torch


class TensorBytes:
    """`hvd_slowmo.core.start.bulk.Body` of a tensor for which `is_plain` holds, on any device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()
        self.dtype, self.shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        self.nbytes = math.prod(self.shape) * tensor.element_size()
        self._flat: torch.Tensor | None = None
        self._written = False

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        values: NDArray[np.uint8] = self._bytes()[start:stop].cpu().numpy()
        return values

    def write(self, start: int, values: NDArray[np.uint8]) -> None:
        self._written = True
        # A copy, because PyTorch warns of arrays that can't be written.
        self._bytes()[start : start + len(values)].copy_(torch.from_numpy(values.copy()))

    def close(self) -> None:
        if self._written and not self._tensor.is_contiguous():
            self._tensor.copy_(self._bytes().view(self._tensor.dtype).view(self.shape))
        self._flat, self._written = None, False

    def _bytes(self) -> torch.Tensor:
        """Return the tensor's own memory, or a copy where its elements do not lie in their order."""
        if self._flat is None:
            self._flat = self._tensor.reshape(-1).view(torch.uint8)
        return self._flat


class TorchCarrier:
    """`hvd_slowmo.core.start.bulk.Carrier` of PyTorch tensors."""

    def sum_words(self, comm: ScopedComm, name: str, words: NDArray[np.int64]) -> NDArray[np.int64]:
        total: NDArray[np.int64] = comm.wait(comm.start_sum(name, torch.from_numpy(words))).numpy()
        return total

    def body(self, item: Any) -> Body | None:
        return TensorBytes(item) if isinstance(item, torch.Tensor) and is_plain(item) else None

    def new(self, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype))


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is nothing but its elements: no sparse one, and none of a quantization library's."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def on_wire(model: nn.Module, spec: TensorSpec) -> Body:
    """Return a tensor of a ParameterMap in the wire's form; bfloat16 as float32."""

    def put(values: NDArray[Any]) -> None:
        write_torch(model, [spec], {spec.name: values})

    dtype = "float32" if spec.dtype == "bfloat16" else spec.dtype
    return WholeArray(dtype, spec.shape, lambda: read_torch(model, [spec])[spec.name], put)


def bodies_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Body]:
    """Return each tensor as bytes."""
    return {name: TensorBytes(tensor) for name, tensor in tensors.items()}
