"""The layers of a PyTorch model and their tensors, as they travel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from hvd_slowmo.wire.parameter_map import Fix, Layer, ParameterMap, Part
from hvd_slowmo.wire.tensors import Role, TensorSpec
from hvd_slowmo.wire.views import View


def entries_torch(model: nn.Module, parameter_map: ParameterMap | None = None) -> list[TensorSpec]:
    """Return the tensors of a model that travel, in wire order.

    A parameter without requires_grad is "frozen". A tied parameter travels once, with its first layer. Buffers that are
    not persistent (`register_buffer(..., persistent=False)`) are constants and do not travel.

    Args:
        parameter_map: None for the automatic one.

    Raises:
        ValueError: a tensor can't travel; the message has the reason and the fix.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [(spec.name, spec.shape) for spec in entries_torch(model)][::2]
        [('0.linear.weight', (3, 2)), ('1.linear.weight', (1, 3))]
    """
    return (parameter_map or ParameterMap()).arrange(list(_layers(model)), "torch")


def _layers(model: nn.Module) -> Iterator[Layer]:
    seen: set[int] = set()
    within: set[int] = set()  # modules that are part of a layer above them
    for path, module in model.named_modules():
        if id(module) in within:
            continue
        if isinstance(module, nn.MultiheadAttention):
            within.update(id(child) for child in module.modules())
        kind, describer = _describer(module)
        parts = _Parts(path, module, seen)
        described = describer(parts) if describer else [(path, kind, list(_unknown(parts)))]
        seen |= parts.taken
        for name, layer_kind, tensors in described:
            if tensors:
                yield Layer(name, layer_kind, tuple(tensors))


class _Parts:
    """Lists the tensors of one module as parts of a layer."""

    def __init__(self, path: str, module: nn.Module, seen: set[int]) -> None:
        self.path = path
        self.module: Any = module
        self._seen = seen
        self.taken: set[int] = set()

    def get(
        self,
        name: str,
        attribute: str,
        note: str = "",
        rows: tuple[int, int] | None = None,
        role: Role | None = None,
    ) -> list[Part]:
        """Return a tensor under its neutral name; an empty list if the module has none or another layer has it already.

        Args:
            attribute: PyTorch's name of it.
            rows: of the tensor, where the part is not all of it.
            role: None for that of a parameter.
        """
        tensor = _get(self.module, attribute)
        if tensor is None or id(tensor) in self._seen:
            return []
        own = f"{self.path}.{attribute}" if self.path else attribute
        if is_lazy(tensor):
            raise ValueError(f"{own} has no shape yet. Run the model once on a batch first.")
        shape = tuple(tensor.shape)
        view = View.same(shape) if rows is None else View.rows(shape, *rows)
        self.taken.add(id(tensor))
        role = role or ("parameter" if tensor.requires_grad else "frozen")
        return [Part(name, role, str(tensor.dtype).removeprefix("torch."), own, view, note)]

    def role_of_statistics(self) -> Role:
        """Return the role of BatchNorm's statistics: those of a frozen layer stay as they are."""
        trained = [p.requires_grad for p in self.module.parameters(recurse=False)]
        return "frozen" if trained and not any(trained) else "statistic"


Described = list[tuple[str, str, list[Part]]]
"""Per layer: path, kind, parts."""


def _linear(p: _Parts) -> Described:
    return [(p.path, "linear", [*p.get("weight", "weight"), *p.get("bias", "bias")])]


def _conv(p: _Parts) -> Described:
    module = p.module
    kind = "conv_transpose" if isinstance(module, _ConvTransposeNd) else "conv"
    # Of depthwise and grouped convolutions the shape says the rest: (out, in / groups, ...).
    note = f"groups {module.groups}" if module.groups != 1 and kind == "conv_transpose" else ""
    return [(p.path, kind, [*p.get("weight", "weight", note), *p.get("bias", "bias")])]


def _batch_norm(p: _Parts) -> Described:
    note, role = f"eps {p.module.eps:g}", p.role_of_statistics()
    parts = [*p.get("weight", "weight", note), *p.get("bias", "bias", note)]
    parts += p.get("mean", "running_mean", note, role=role) + p.get("variance", "running_var", note, role=role)
    return [(p.path, "batch_norm", parts)]


def _norm(kind: str) -> Callable[[_Parts], Described]:
    def describe(p: _Parts) -> Described:
        note = f"eps {p.module.eps:g}" + (f", groups {p.module.num_groups}" if kind == "group_norm" else "")
        return [(p.path, kind, [*p.get("weight", "weight", note), *p.get("bias", "bias", note)])]

    return describe


def _embedding(p: _Parts) -> Described:
    module = p.module
    facts = {"padding_idx": module.padding_idx, "max_norm": module.max_norm}
    facts["scale_grad_by_freq"] = module.scale_grad_by_freq or None
    # Keras has no such settings: a model with one of them trains another function.
    note = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    return [(p.path, "embedding", p.get("weight", "weight", note))]


def _recurrent(p: _Parts) -> Described:
    module, cell = p.module, isinstance(p.module, nn.RNNCellBase)
    kind = "lstm" if isinstance(module, (nn.LSTM, nn.LSTMCell)) else "gru"
    directions = ("", "_reverse")[: 1 if cell else 1 + module.bidirectional]
    suffixes = [""] if cell else [f"_l{n}{direction}" for n in range(module.num_layers) for direction in directions]
    described: Described = []
    for suffix in suffixes:
        path = p.path if len(suffixes) == 1 else f"{p.path}.{suffix[1:]}".lstrip(".")
        parts = _lstm(p, suffix) if kind == "lstm" else _gru(p, suffix)
        if not cell and module.proj_size:
            parts = _refused(parts, "Keras' LSTM has no projection (proj_size).")
        described.append((path, kind + ("_reverse" if suffix.endswith("reverse") else ""), parts))
    return described


def _lstm(p: _Parts, suffix: str) -> list[Part]:
    """List an LSTM's tensors; both frameworks have the gates in the same order: input, forget, cell, output."""
    parts = p.get("weight_ih", f"weight_ih{suffix}") + p.get("weight_hh", f"weight_hh{suffix}")
    bias, second = p.get("bias", f"bias_ih{suffix}"), _get(p.module, f"bias_hh{suffix}")
    if bias and second is not None and (second.requires_grad or bool(second.any())):
        bias = _refused(
            bias,
            "PyTorch's LSTM has two bias vectors where Keras' has one, and training both moves their sum at twice the "
            f"rate. Freeze the second at zero (bias_hh{suffix}: torch.nn.init.zeros_ and requires_grad_(False)), or "
            "build the LSTM with bias=False here and use_bias=False in Keras.",
        )
    return parts + bias


def _gru(p: _Parts, suffix: str) -> list[Part]:
    """List a GRU's tensors; Keras has the gates in another order, so each travels by itself."""
    parts = []
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        tensor = _get(p.module, kind + suffix)
        if tensor is None:
            continue
        n = len(tensor) // 3
        for number, gate in enumerate("rzn"):
            parts += p.get(f"{kind}.{gate}", kind + suffix, rows=(number * n, (number + 1) * n))
    return parts


def _attention(p: _Parts) -> Described:
    module, parts = p.module, []
    n, note = module.embed_dim, f"heads {module.num_heads}"
    for number, name in enumerate(("query", "key", "value")):
        rows = (number * n, (number + 1) * n)
        separate = p.get(f"{name}.weight", f"{name[0]}_proj_weight", note)
        parts += separate or p.get(f"{name}.weight", "in_proj_weight", note, rows)
        parts += p.get(f"{name}.bias", "in_proj_bias", note, rows)
    parts += p.get("out.weight", "out_proj.weight", note) + p.get("out.bias", "out_proj.bias", note)
    if module.bias_k is not None:
        parts = _refused(parts, "Keras' MultiHeadAttention has no add_bias_kv.")
    return [(p.path, "attention", parts)]


_DESCRIBERS: tuple[tuple[type | tuple[type, ...], Callable[[_Parts], Described], set[str]], ...] = (
    (nn.MultiheadAttention, _attention, set()),
    (nn.Linear, _linear, {"weight", "bias"}),
    (_ConvNd, _conv, {"weight", "bias"}),
    (_BatchNorm, _batch_norm, {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}),
    (nn.LayerNorm, _norm("layer_norm"), {"weight", "bias"}),
    (nn.GroupNorm, _norm("group_norm"), {"weight", "bias"}),
    (nn.Embedding, _embedding, {"weight"}),
    ((nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell), _recurrent, set()),
)


def _describer(module: nn.Module) -> tuple[str, Callable[[_Parts], Described] | None]:
    """Return the describer of a known layer that has the tensors of its kind and no others.

    Parametrizations move them.
    """
    for types, describer, names in _DESCRIBERS:
        if isinstance(module, types):
            own = {**module._parameters, **module._buffers}
            if not names or (set(own) <= names and "parametrizations" not in module._modules):
                return "", describer
    return type(module).__name__, None


def _unknown(p: _Parts) -> Iterator[Part]:
    module = p.module
    refusal = f"{type(module).__module__}.{type(module).__qualname__} is not a layer whose Keras form is known."
    for name in module._parameters:
        yield from _refused(p.get(name, name), refusal, "pair")
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set and buffer.is_floating_point():
            text = f"a buffer of {type(module).__qualname__}, whose Keras form is not known. Give it as a pair to "
            text += "average it, or as ParameterMap(ignore=[...]) to let it stay each worker's own."
            yield from _refused(p.get(name, name, role="statistic"), text, "pair")


def _refused(parts: list[Part], refusal: str, fix: Fix = "") -> list[Part]:
    return [replace(part, refusal=refusal, fix=fix) for part in parts]


def _get(module: nn.Module, name: str) -> torch.Tensor | None:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, torch.Tensor) else None
