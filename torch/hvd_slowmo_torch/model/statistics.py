"""Tensors of a model that are not trained, and whether they are averaged."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

logger = logging.getLogger("hvd_slowmo")


def chosen_statistics(
    model: nn.Module, trained: set[int], choice: Mapping[str, bool]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that are averaged without being trained: (name, tensor).

    By themselves these are the floating-point buffers, and BatchNorm's counts of batches.

    Args:
        trained: ids of the parameters that the optimizer has.
        choice: for patterns of names, whether what they fit is averaged; the last one that fits decides.

    Raises:
        TypeError: one that is to be averaged has no mean.
    """
    for name, tensor, usual in _untrained(model, trained):
        chosen = choice_of(name, choice)
        if not (usual if chosen is None else chosen):
            continue
        if chosen and not tensor.is_floating_point():
            raise TypeError(f"`statistics` averages {name}, which has type {tensor.dtype} and no mean.")
        yield name, tensor


def check_patterns(model: nn.Module, trained: set[int], choice: Mapping[str, bool]) -> None:
    """Refuse a pattern by which nothing would be averaged, and warn of one by which nothing is left alone yet.

    Args:
        trained, choice: as in `chosen_statistics`.

    Raises:
        ValueError: naming the pattern.
    """
    found = [name for name, _, _ in _untrained(model, trained)]
    for pattern, averaged in choice.items():
        if any(fnmatchcase(name, pattern) for name in found):
            continue
        words = (
            f"`statistics` has {pattern!r}, and no tensor of that name is there that is not trained. These are: "
            f"{', '.join(found) or 'none'}."
        )
        if averaged:
            raise ValueError(words)
        # The model may make such a buffer in its first forward pass.
        logger.warning("%s One that the model makes later will be left alone.", words)


def choice_of(name: str, choice: Mapping[str, bool]) -> bool | None:
    """Return whether a tensor of this name is averaged by choice; None where no pattern fits it.

    Example:
        >>> choice_of("block.cache", {"*": True, "*cache": False})
        False
    """
    return next((choice[pattern] for pattern in reversed(list(choice)) if fnmatchcase(name, pattern)), None)


def floating_buffers(model: nn.Module, choice: Mapping[str, bool]) -> set[str]:
    """Return the names of the floating-point buffers that workers must have in common.

    Args:
        choice: as in `chosen_statistics`.
    """
    named = model.named_buffers()
    return {name for name, x in named if x.is_floating_point() and choice_of(name, choice) is not False}


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
