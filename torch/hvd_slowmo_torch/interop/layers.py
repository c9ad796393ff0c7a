"""What a PyTorch model puts on the wire: its layers, and the parts of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from hvd_slowmo.wire.parameter_map import Layer, ParameterMap, Part
from hvd_slowmo.wire.tensors import TensorSpec
from hvd_slowmo.wire.views import View


def entries_torch(model: nn.Module, parameter_map: ParameterMap | None = None) -> list[TensorSpec]:
    """The wire entries of a model, in wire order.

    A parameter without requires_grad is "frozen". A tied parameter has one entry, in its first layer. What is not
    persistent (`register_buffer(..., persistent=False)`) is a constant and does not travel.

    Args:
        parameter_map: None for the automatic one.

    Raises:
        ValueError: a tensor that can't be put on the wire, with the reason and what to do.
    """
    return (parameter_map or ParameterMap()).arrange(list(_layers(model)), "torch")


def _layers(model: nn.Module) -> Iterator[Layer]:
    seen: set[int] = set()
    within: set[int] = set()  # modules that belong to a layer above them
    for path, module in model.named_modules():
        if id(module) in within:
            continue
        if isinstance(module, nn.MultiheadAttention):
            within.update(id(child) for child in module.modules())
        kind, describer = _describer(module)
        parts = _Parts(path, module, seen)
        described = describer(parts) if describer else [(path, kind, list(_unknown(parts)))]
        seen |= parts.taken
        for name, layer_kind, found in described:
            if found:
                yield Layer(name, layer_kind, tuple(found))


class _Parts:
    """Makes the parts of one module's tensors."""

    def __init__(self, path: str, module: nn.Module, seen: set[int]) -> None:
        self.path = path
        self.module: Any = module
        self._seen = seen
        self.taken: set[int] = set()

    def own(
        self, role: str, name: str, note: str = "", rows: tuple[int, int] | None = None, rule: str = ""
    ) -> list[Part]:
        """The tensor `name`, as a list with nothing in it where there is none or another layer has it already."""
        tensor = _get(self.module, name)
        if tensor is None or id(tensor) in self._seen:
            return []
        own = f"{self.path}.{name}" if self.path else name
        if is_lazy(tensor):
            raise ValueError(f"{own} has no shape yet. Run the model once on a batch before it is described.")
        shape = tuple(tensor.shape)
        view = View.same(shape) if rows is None else View.rows(shape, *rows)
        rule = rule or ("slow" if tensor.requires_grad else "frozen")
        self.taken.add(id(tensor))
        return [Part(role, rule, str(tensor.dtype).removeprefix("torch."), own, view, note)]

    def statistics(self) -> str:
        """The rule of BatchNorm's statistics: those of a frozen layer stay as they are."""
        trained = [p.requires_grad for p in self.module.parameters(recurse=False)]
        return "frozen" if trained and not any(trained) else "mean"


Described = list[tuple[str, str, list[Part]]]
"""Per layer: path, kind, parts."""


def _linear(p: _Parts) -> Described:
    return [(p.path, "linear", [*p.own("weight", "weight"), *p.own("bias", "bias")])]


def _conv(p: _Parts) -> Described:
    module = p.module
    kind = "conv_transpose" if isinstance(module, _ConvTransposeNd) else "conv"
    # Of depthwise and grouped convolutions the shape says the rest: (out, in / groups, ...).
    note = f"groups {module.groups}" if module.groups != 1 and kind == "conv_transpose" else ""
    return [(p.path, kind, [*p.own("weight", "weight", note), *p.own("bias", "bias")])]


def _batch_norm(p: _Parts) -> Described:
    note, rule = f"eps {p.module.eps:g}", p.statistics()
    parts = [*p.own("weight", "weight", note), *p.own("bias", "bias", note)]
    parts += p.own("mean", "running_mean", note, rule=rule) + p.own("variance", "running_var", note, rule=rule)
    return [(p.path, "batch_norm", parts)]


def _norm(kind: str) -> Callable[[_Parts], Described]:
    def describe(p: _Parts) -> Described:
        note = f"eps {p.module.eps:g}" + (f", groups {p.module.num_groups}" if kind == "group_norm" else "")
        return [(p.path, kind, [*p.own("weight", "weight", note), *p.own("bias", "bias", note)])]

    return describe


def _embedding(p: _Parts) -> Described:
    module = p.module
    facts = {"padding_idx": module.padding_idx, "max_norm": module.max_norm}
    facts["scale_grad_by_freq"] = module.scale_grad_by_freq or None
    # Keras has none of them: a model with one of them trains another function.
    note = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    return [(p.path, "embedding", p.own("weight", "weight", note))]


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
    """The gates stand in the same order in both frameworks: input, forget, cell, output."""
    parts = p.own("weight_ih", f"weight_ih{suffix}") + p.own("weight_hh", f"weight_hh{suffix}")
    bias, second = p.own("bias", f"bias_ih{suffix}"), _get(p.module, f"bias_hh{suffix}")
    if bias and second is not None and (second.requires_grad or bool(second.any())):
        bias = _refused(
            bias,
            "PyTorch's LSTM has two bias vectors where Keras' has one, and training both moves their sum at twice the "
            f"rate. Freeze the second at zero (bias_hh{suffix}: torch.nn.init.zeros_ and requires_grad_(False)), or "
            "build the LSTM with bias=False here and use_bias=False in Keras.",
        )
    return parts + bias


def _gru(p: _Parts, suffix: str) -> list[Part]:
    """The gates stand in another order in Keras, so each travels by itself."""
    parts = []
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        tensor = _get(p.module, kind + suffix)
        if tensor is None:
            continue
        n = len(tensor) // 3
        for number, gate in enumerate("rzn"):
            parts += p.own(f"{kind}.{gate}", kind + suffix, rows=(number * n, (number + 1) * n))
    return parts


def _attention(p: _Parts) -> Described:
    module, parts = p.module, []
    n, note = module.embed_dim, f"heads {module.num_heads}"
    for number, name in enumerate(("query", "key", "value")):
        rows = (number * n, (number + 1) * n)
        separate = p.own(f"{name}.weight", f"{name[0]}_proj_weight", note)
        parts += separate or p.own(f"{name}.weight", "in_proj_weight", note, rows)
        parts += p.own(f"{name}.bias", "in_proj_bias", note, rows)
    parts += p.own("out.weight", "out_proj.weight", note) + p.own("out.bias", "out_proj.bias", note)
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
    """The describer of a known layer that has the tensors of its kind and no others (parametrizations move them)."""
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
        yield from _refused(p.own(name, name), refusal, "pair")
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set and buffer.is_floating_point():
            text = f"a buffer of {type(module).__qualname__}, of which the Keras form is not known. Give it as a pair "
            text += "to be averaged, or as ParameterMap(ignore=[...]) to stay each worker's own."
            yield from _refused(p.own(name, name, rule="mean"), text, "pair")


def _refused(parts: list[Part], refusal: str, cure: str = "") -> list[Part]:
    return [Part(x.role, x.rule, x.dtype, x.own, x.view, x.note, x.features, refusal, cure) for x in parts]


def _get(module: nn.Module, name: str) -> torch.Tensor | None:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, torch.Tensor) else None
