"""Which tensors of a PyTorch model travel, in which order, and where they are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.layout import Entry, Layout, Tensor, arrange
from hvd_slowmo.core.startup import Groups
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo.wire.tensors import TensorSpec
from hvd_slowmo.wire.views import View
from hvd_slowmo_torch import inner_optimizer as base_state
from hvd_slowmo_torch.interop.layers import entries_torch
from hvd_slowmo_torch.interop.weights import tensors_of

Slot = Callable[[], torch.Tensor]
"""Finds a tensor when it is needed: optimizers and users replace tensors, so none is kept."""


class Place(NamedTuple):
    """Where a tensor of the layout is: what of the slot's tensor, which PyTorch calls `own`, the view shows.

    The wire has PyTorch's orientation, so that is always one stretch of the flattened tensor.
    """

    slot: Slot
    view: View
    own: str

    @property
    def offset(self) -> int:
        """Where the stretch begins."""
        offset = self.view.offset
        assert offset is not None, "the wire has PyTorch's orientation"
        return offset


@dataclass(frozen=True)
class Plan:
    """The layout of a model and, per segment, where its tensors are."""

    layout: Layout
    places: tuple[tuple[Place, ...], ...]
    statistics: tuple[Slot, ...]  # BatchNorm's running means and variances, which must be finite


def entries_of(model: nn.Module, base: Optimizer, parameter_map: ParameterMap | None) -> list[TensorSpec]:
    """What of the model takes part: on the wire of a map, or as the base optimizer and the model have it.

    Without a map, floating-point buffers and BatchNorm's step counts are averaged; other integers stay each worker's
    own.

    Raises:
        ValueError: a parameter of the base optimizer that the model does not have; with a map what `ParameterMap`
            refuses, or a trained parameter that the base optimizer does not have.
        TypeError: complex or integer parameters.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for number, group in enumerate(base.param_groups):
        for position, p in enumerate(group["params"]):
            if id(p) not in names:
                raise ValueError(
                    f"parameter {position} of the base optimizer's group {number} (shape {tuple(p.shape)}) is not a "
                    "parameter of the model. Give SlowMo the model whose parameters the base optimizer has."
                )
            if p.is_meta:
                raise ValueError(f"{names[id(p)]} is on the meta device: it has no values. Give it some first.")
            wire_dtype(p.dtype, names[id(p)])
    if parameter_map is not None:
        return _mapped(model, base, parameter_map)
    parameters = [(names[id(p)], p) for group in base.param_groups for p in group["params"]]
    entries = [_entry("slow", name, p) for name, p in parameters]
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() or (isinstance(module, _NormBase) and key == "num_batches_tracked"):
                entries.append(_entry("mean", f"{name}.{key}" if name else key, buffer))
    return entries


def _mapped(model: nn.Module, base: Optimizer, parameter_map: ParameterMap) -> list[TensorSpec]:
    entries = entries_torch(model, parameter_map)
    own = {id(p) for group in base.param_groups for p in group["params"]}
    parameters = tensors_of(model)
    lacking = [entry.own for entry in entries if entry.rule == "slow" and id(parameters[entry.own]) not in own]
    if lacking:
        raise ValueError(
            "with a parameter_map the base optimizer must have all trained parameters of the model, as Keras' has. It "
            f"lacks: {', '.join(dict.fromkeys(lacking))}. Add them, or freeze them with requires_grad_(False)."
        )
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise ValueError(f"with a parameter_map the model must be on one device. It is on {', '.join(devices)}.")
    return entries


def _entry(rule: str, name: str, tensor: torch.Tensor) -> TensorSpec:
    shape = tuple(tensor.shape)
    return TensorSpec(name, rule, shape, _spell(tensor.dtype), View.same(shape), name)


def groups_of(entries: Sequence[TensorSpec], model: nn.Module, base: Optimizer) -> Groups:
    """The base optimizer's own groups."""
    numbers = {id(p): number for number, group in enumerate(base.param_groups) for p in group["params"]}
    parameters = tensors_of(model)
    of = tuple(numbers[id(parameters[entry.own])] for entry in entries if entry.rule == "slow")
    return Groups(of, tuple(range(len(base.param_groups))))


def lay_out(
    model: nn.Module, base: Optimizer, config: SlowMoConfig, entries: Sequence[TensorSpec], groups: Groups
) -> Plan:
    """The trained and averaged entries and, where they are averaged, the base optimizer's buffers.

    Statistics travel as float64: the mean of equal values is then that value, for constants such as masks and position
    tables too.

    Raises:
        ValueError: no trained parameter with an element.
    """
    slots = dict(_slots(model))
    norms = {id(module) for module in model.modules() if isinstance(module, _NormBase)}
    statistics: list[Slot] = []
    tensors: list[Tensor[Place]] = []
    numbers = iter(groups.of)
    for entry in entries:
        if entry.rule == "frozen":
            continue
        slot, module = slots[entry.own]
        tensor = slot()
        mean = entry.rule == "mean"
        if mean and id(module) in norms and tensor.is_floating_point():
            statistics.append(slot)
        wire = torch.float64 if mean else wire_dtype(tensor.dtype, entry.own)
        laid = Entry(entry.name, entry.shape, _spell(tensor.dtype), 0 if mean else next(numbers))
        tensors.append(_tensor(entry.rule, laid, wire, tensor, Place(slot, entry.view, entry.own)))
    if config.buffers == "average" and config.tau is not None:
        tensors += _buffers(model, base)
    laid_out, places = arrange(tensors, len(groups.own))
    if all(chunk.rule != "slow" for chunk in laid_out.chunks):
        raise ValueError("the base optimizer has no parameter with an element.")
    return Plan(laid_out, places, tuple(statistics))


def _buffers(model: nn.Module, base: Optimizer) -> Iterator[Tensor[Place]]:
    names = {id(p): name for name, p in model.named_parameters()}
    for key, found in base_state.averaged(base).items():
        for p, like in found:
            name = f"{names[id(p)]} ({key})"
            slot = partial(base_state.state_tensor, base, p, key, tuple(like.shape), like.dtype, like.device)
            entry = Entry(name, tuple(like.shape), _spell(like.dtype))
            yield _tensor("base", entry, wire_dtype(like.dtype, name), like, Place(slot, View.same(entry.shape), name))


def _tensor(rule: str, entry: Entry, wire: torch.dtype, tensor: torch.Tensor, place: Place) -> Tensor[Place]:
    return Tensor(rule, entry, _spell(wire), wire.itemsize, str(tensor.device), place)


def _slots(model: nn.Module) -> Iterator[tuple[str, tuple[Slot, Any]]]:
    """By name: what finds a tensor, and its module."""
    for name, module in model.named_modules(remove_duplicate=False):
        before = f"{name}." if name else ""
        for key, p in module.named_parameters(recurse=False, remove_duplicate=False):
            yield before + key, (partial(_parameter, p), module)
        for key, _ in module.named_buffers(recurse=False, remove_duplicate=False):
            yield before + key, (partial(_buffer, module, key), module)


def wire_dtype(dtype: torch.dtype, name: str) -> torch.dtype:
    """The type in which a tensor travels and in which its anchor and v are kept: float32, or float64 for float64."""
    if not dtype.is_floating_point:
        raise TypeError(f"{name} has type {dtype}; SlowMo averages real floating-point tensors only.")
    return torch.float64 if dtype == torch.float64 else torch.float32


def _parameter(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def _buffer(module: nn.Module, key: str) -> torch.Tensor:
    found: torch.Tensor = getattr(module, key)
    return found


def _spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
