"""Tensors of a model that are not trained, and whether they are averaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hvd_slowmo.core.start.choice import Names, choice_of, is_averaged


def chosen_statistics(
    model: nn.Module, trained: set[int], choice: Mapping[str, bool]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that are averaged without being trained: (name, tensor).

    By themselves these are the floating-point buffers, and BatchNorm's counts of batches.

    Args:
        trained: ids of the parameters that the optimizer has.
        choice: as in `is_averaged`.

    Raises:
        TypeError: one that is to be averaged has no mean.
    """
    for name, tensor, usual in _untrained(model, trained):
        has_mean, dtype = tensor.is_floating_point(), str(tensor.dtype)
        if is_averaged((name,), choice, usual=usual, dtype=dtype, has_mean=has_mean):
            yield name, tensor


def untrained_names(model: nn.Module, trained: set[int]) -> list[Names]:
    """Return the names of the tensors among which there is a choice.

    Args:
        trained: as in `chosen_statistics`.
    """
    return [(name,) for name, _, _ in _untrained(model, trained)]


def floating_buffers(model: nn.Module, choice: Mapping[str, bool]) -> set[str]:
    """Return the names of the floating-point buffers that workers must have in common.

    Args:
        choice: as in `is_averaged`.
    """
    named = model.named_buffers()
    return {name for name, x in named if x.is_floating_point() and choice_of((name,), choice) is not False}


def _untrained(model: nn.Module, trained: set[int]) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield the tensors that the optimizer does not have: (name, tensor, whether it is averaged by itself)."""
    for name, x, module in _buffers(model):
        count = isinstance(module, _NormBase) and name.endswith("num_batches_tracked")
        yield name, x, x.is_floating_point() or count
    for name, p in model.named_parameters():
        if id(p) not in trained:
            yield name, p, False


def _buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Module]]:
    for prefix, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            yield f"{prefix}.{key}" if prefix else key, buffer, module
