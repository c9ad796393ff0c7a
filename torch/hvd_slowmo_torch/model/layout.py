"""The tensors of a PyTorch model that travel: their order, and how they are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from hvd_slowmo.core.parts.layout import ModelLayout, ParameterGroups
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo.wire.tensors import Role, TensorSpec
from hvd_slowmo.wire.views import View
from hvd_slowmo_torch.inner import inner_optimizer as inner_state
from hvd_slowmo_torch.interop.layers import entries_torch
from hvd_slowmo_torch.interop.weights import tensors_of
from hvd_slowmo_torch.model.spectral import Estimate, estimate_of
from hvd_slowmo_torch.model.statistics import chosen_statistics

Find = Callable[[], torch.Tensor]
"""Finds a tensor when it is needed: optimizers and users replace tensors, so none is kept."""


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor of the wire, and the PyTorch tensor that it is, or is a stretch of.

    Attributes:
        spec: the tensor; its view leads from PyTorch's tensor to the wire.
        device: of the tensor.
        find: returns the tensor.
        watched: a running statistic of BatchNorm, which must be finite as parameters must.
        unit: for a vector of spectral normalization, its estimate: its mean is given length 1 again.
        count: the number of an inner optimizer's steps: its mean is rounded.
        begin: of inner state, makes what is missing of a parameter's, as zeros. Until then `find` finds zeros that
            nobody keeps, and `missing` holds.
    """

    spec: TensorSpec
    device: str
    find: Find
    watched: bool = False
    unit: Estimate | None = None
    count: bool = False
    begin: Callable[[], None] = lambda: None
    missing: Callable[[], bool] = lambda: False

    @property
    def offset(self) -> int:
        """Start of the stretch in the flattened tensor; the wire has PyTorch's orientation, so it is one stretch."""
        offset = self.spec.view.offset
        assert offset is not None, "the wire has PyTorch's orientation"
        return offset


TorchLayout = ModelLayout[TensorRef]


def refs_of(
    model: nn.Module,
    inner: Optimizer,
    parameter_map: ParameterMap | None,
    statistics: Mapping[str, bool] | None = None,
) -> list[TensorRef]:
    """Return the tensors of the model that take part: on the wire of a map, or as optimizer and model have them.

    Without a map, floating-point buffers and BatchNorm's step counts are averaged; other integers stay each worker's
    own.

    Args:
        statistics: for patterns of the names of buffers and of parameters that are not trained, whether these are
            averaged.

    Raises:
        ValueError: the inner optimizer has a parameter that the model lacks; with a map, a model that `ParameterMap`
            refuses, or a trained parameter that the inner optimizer lacks.
        TypeError: complex or integer parameters.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    for number, group in enumerate(inner.param_groups):
        for position, p in enumerate(group["params"]):
            if id(p) not in names:
                raise ValueError(
                    f"parameter {position} of the inner optimizer's group {number} (shape {tuple(p.shape)}) is not a "
                    "parameter of the model. Give SlowMo the model whose parameters the inner optimizer has; where it "
                    "has those of several modules, nn.ModuleList([encoder, decoder])."
                )
            if p.is_meta:
                raise ValueError(f"{names[id(p)]} is on the meta device: it has no values. Give it some first.")
            check_floating(p, names[id(p)])
    if parameter_map is not None:
        specs = _mapped_specs(model, inner, parameter_map)
    else:
        specs = [_spec("parameter", names[id(p)], p) for group in inner.param_groups for p in group["params"]]
        trained = {id(p) for group in inner.param_groups for p in group["params"]}
        specs += [_spec("statistic", name, x) for name, x in chosen_statistics(model, trained, statistics or {})]
    places = dict(_places(model))
    refs = []
    for spec in specs:
        find, module = places[spec.own]
        tensor = find()
        watched = spec.role == "statistic" and isinstance(module, _NormBase) and tensor.is_floating_point()
        unit = estimate_of(model, module, spec.own) if spec.role == "statistic" else None
        refs.append(TensorRef(spec, str(tensor.device), find, watched, unit))
    return refs


def state_refs(model: nn.Module, inner: Optimizer) -> Iterator[TensorRef]:
    """Yield the inner optimizer's state tensors, for inner_state="average"."""
    names = {id(p): name for name, p in model.named_parameters()}
    averaged = inner_state.averaged(inner)
    forms: dict[int, dict[str, inner_state.Form]] = {}
    for key, found in averaged.items():
        for p, like in found:
            forms.setdefault(id(p), {})[key] = like.shape, like.dtype, like.device
    for key, found in averaged.items():
        for p, like in found:
            name = f"{names[id(p)]} ({key})"
            check_floating(like, name)
            find = partial(inner_state.state_tensor, inner, p, key, forms[id(p)][key])
            yield TensorRef(
                _spec("optimizer_state", name, like),
                str(like.device),
                find,
                count=key == "step" and like.numel() == 1,
                begin=partial(inner_state.begin, inner, p, forms[id(p)]),
                missing=partial(inner_state.is_missing, inner, p, key),
            )


def groups_of(refs: list[TensorRef], model: nn.Module, inner: Optimizer) -> ParameterGroups:
    """Return the inner optimizer's own parameter groups."""
    numbers = {id(p): number for number, group in enumerate(inner.param_groups) for p in group["params"]}
    tensors = tensors_of(model)
    of = tuple(numbers[id(tensors[ref.spec.own])] for ref in refs if ref.spec.role == "parameter")
    return ParameterGroups(of, tuple(range(len(inner.param_groups))))


def check_floating(tensor: torch.Tensor, name: str) -> None:
    """Refuse a tensor of a type that has no mean.

    Raises:
        TypeError: it is no real floating-point tensor.
    """
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} has type {tensor.dtype}; SlowMo averages real floating-point tensors only.")


def _mapped_specs(model: nn.Module, inner: Optimizer, parameter_map: ParameterMap) -> list[TensorSpec]:
    specs = entries_torch(model, parameter_map)
    trained = {id(p) for group in inner.param_groups for p in group["params"]}
    tensors = tensors_of(model)
    missing = [s.own for s in specs if s.role == "parameter" and id(tensors[s.own]) not in trained]
    if missing:
        raise ValueError(
            "with a parameter_map the inner optimizer must have all trained parameters of the model, as Keras' has. It "
            f"lacks: {', '.join(dict.fromkeys(missing))}. Add them, or freeze them with requires_grad_(False)."
        )
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise ValueError(f"with a parameter_map the model must be on one device. It is on {', '.join(devices)}.")
    return specs


def _spec(role: Role, name: str, tensor: torch.Tensor) -> TensorSpec:
    shape = tuple(tensor.shape)
    return TensorSpec(name, role, shape, str(tensor.dtype).removeprefix("torch."), View.same(shape), name)


def _places(model: nn.Module) -> Iterator[tuple[str, tuple[Find, nn.Module]]]:
    """Yield, by name, a function that finds the tensor, and its module."""
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for key, p in module.named_parameters(recurse=False, remove_duplicate=False):
            yield prefix + key, (partial(_parameter, p), module)
        for key, _ in module.named_buffers(recurse=False, remove_duplicate=False):
            yield prefix + key, (partial(_buffer, module, key), module)


def _parameter(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def _buffer(module: nn.Module, key: str) -> torch.Tensor:
    found: torch.Tensor = getattr(module, key)
    return found
