"""Tensors of a model that are not trained, and whether they are averaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm


def chosen_statistics(
    model: nn.Module, trained: set[int], choice: Mapping[str, bool]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that are averaged without being trained: (name, tensor).

    By themselves these are the floating-point buffers, and BatchNorm's counts of batches.

    Args:
        trained: ids of the parameters that the optimizer has.
        choice: for patterns of names, whether what they fit is averaged; the last one that fits decides.

    Raises:
        ValueError: a pattern fits no tensor.
        TypeError: one that is to be averaged has no mean.
    """
    found: list[tuple[str, torch.Tensor, bool]] = [
        (name, x, x.is_floating_point() or (isinstance(module, _NormBase) and name.endswith("num_batches_tracked")))
        for name, x, module in _buffers(model)
    ]
    found += [(name, p, False) for name, p in model.named_parameters() if id(p) not in trained]
    for pattern in choice:
        if not any(fnmatchcase(name, pattern) for name, _, _ in found):
            names = ", ".join(name for name, _, _ in found) or "none"
            raise ValueError(
                f"`statistics` has {pattern!r}, and no tensor of that name is there that is not trained. These are: "
                f"{names}."
            )
    for name, tensor, usual in found:
        fitting = [averaged for pattern, averaged in choice.items() if fnmatchcase(name, pattern)]
        if not (fitting[-1] if fitting else usual):
            continue
        if fitting and not tensor.is_floating_point():
            raise TypeError(f"`statistics` averages {name}, which has type {tensor.dtype} and no mean.")
        yield name, tensor


def is_unit_vector(module: nn.Module, key: str) -> bool:
    """Return whether a buffer is one of spectral normalization's vectors, in either of PyTorch's forms.

    A mean of vectors of length 1 is shorter, and would scale the layer's weight.

    Example:
        >>> layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 2))
        >>> is_unit_vector(layer.parametrizations.weight[0], "_u")
        True
    """
    if isinstance(module, _SpectralNorm):
        return key in ("_u", "_v")
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    return any(key in (f"{hook.name}_u", f"{hook.name}_v") for hook in hooks)


def _buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Module]]:
    for prefix, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            yield f"{prefix}.{key}" if prefix else key, buffer, module
