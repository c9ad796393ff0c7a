"""Outputs and gradients of a PyTorch model: its half of `hvd_slowmo.interop.compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hvd_slowmo.wire.tensors import TensorSpec
from hvd_slowmo_torch.interop.weights import read_torch

Array = NDArray[Any]


def outputs_and_gradients(
    model: Any, specs: Sequence[TensorSpec], inputs: Sequence[Array], seed: int
) -> tuple[Array, Array, dict[str, Array]]:
    """Return the outputs of a batch, random weights of their shape, and the gradients of the weighted sum.

    Mode and gradients of the model are afterwards as they were.
    """
    was_training = model.training
    model.eval()
    before = {name: p.grad for name, p in model.named_parameters()}
    try:
        model.zero_grad(set_to_none=True)
        outputs = model(*map(torch.from_numpy, inputs))
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs  # recurrent layers return their states too
        weights = np.random.default_rng(seed).standard_normal(tuple(outputs.shape)).astype(str(outputs.dtype)[6:])
        (outputs * torch.from_numpy(weights)).sum().backward()
        gradients = read_torch(model, specs, gradients=True)
    finally:
        model.train(was_training)
        for name, p in model.named_parameters():
            p.grad = before[name]
    return outputs.detach().numpy(), weights, gradients
