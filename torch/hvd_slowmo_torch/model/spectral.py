"""The vectors of spectral normalization, in either of PyTorch's forms, and their mean over the workers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

Estimate = Callable[[], None]
"""Estimates both vectors of a weight anew, from the weight alone."""

_ITERATIONS = 15  # as many as PyTorch begins with
_SHORT = 0.5  # the length of a mean whose vectors do not have one direction


def estimate_of(model: nn.Module, module: nn.Module, name: str) -> Estimate | None:
    """Return the estimate of a vector of spectral normalization; None for any other buffer.

    Args:
        module: the buffer's.
        name: of the buffer in the model.

    Example:
        >>> model = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 2))
        >>> estimate_of(model, model.parametrizations.weight[0], "parametrizations.weight.0._u") is None
        False
    """
    path, _, key = name.rpartition(".")
    if isinstance(module, _SpectralNorm):
        return partial(_estimate_parametrized, model, path) if key in ("_u", "_v") else None
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and key in (f"{hook.name}_u", f"{hook.name}_v"):
            return partial(_estimate_hooked, module, hook)
    return None


def restore_length(vector: torch.Tensor) -> bool:
    """Give a mean of vectors of length 1 that length again: a shorter one would scale the layer's weight.

    Returns:
        Whether the mean is noise, and its pair is to be estimated from the weight that all workers have in common. A
        pair of singular vectors is one up to its sign, which each worker's power iteration finds by itself, and
        vectors of opposite signs cancel.
    """
    noise = float(vector.norm()) < _SHORT
    normalize(vector, dim=0, out=vector)
    return noise


def _estimate_parametrized(model: nn.Module, path: str) -> None:
    parent, _, number = path.rpartition(".")
    weights = model.get_submodule(parent)
    weight = weights.original
    for before in list(weights.children())[: int(number)]:
        weight = before(weight)
    module = model.get_submodule(path)
    _power_method(module._reshape_weight_to_matrix(weight), module._u, module._v)  # type: ignore[operator, arg-type]


def _estimate_hooked(module: nn.Module, hook: SpectralNorm) -> None:
    weight = hook.reshape_weight_to_matrix(getattr(module, f"{hook.name}_orig"))
    _power_method(weight, getattr(module, f"{hook.name}_u"), getattr(module, f"{hook.name}_v"))


@torch.no_grad()
def _power_method(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> None:
    # From the longest row, which is not orthogonal to the vector that is sought unless the weight is 0.
    row = weight[weight.norm(dim=1).argmax()]
    v.copy_(normalize(row, dim=0) if bool(row.any()) else v)
    for _ in range(_ITERATIONS):
        u.copy_(normalize(weight.mv(v), dim=0))
        v.copy_(normalize(weight.t().mv(u), dim=0))
