"""The layers of a Keras model and their variables, as they travel: in PyTorch's orientation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import keras
from keras import layers

from hvd_slowmo.wire.parameter_map import Fix, Layer, ParameterMap, Part
from hvd_slowmo.wire.tensors import Role, TensorSpec
from hvd_slowmo.wire.views import View
from hvd_slowmo_tf.interop import layer_types as kinds
from hvd_slowmo_tf.interop.feature_order import SAME, Order, follow


def entries_keras(model: Any, parameter_map: ParameterMap | None = None) -> list[TensorSpec]:
    """Return the variables of a built model that travel, in wire order.

    A variable that is not trainable is "frozen", and so are the statistics of a BatchNormalization that is not. A layer
    that is used in several places travels once.

    Args:
        parameter_map: None for the automatic one.

    Raises:
        ValueError: a variable can't travel; the message has the reason and the fix. Or the model is not built.

    Example:
        >>> model = keras.Sequential([keras.Input((2,)), layers.Dense(3), layers.ReLU(), layers.Dense(1)])
        >>> [(spec.name, spec.shape) for spec in entries_keras(model)][::2]
        [('0.linear.weight', (3, 2)), ('1.linear.weight', (1, 3))]
    """
    if not model.built or (isinstance(model, keras.Sequential) and kinds.graph(model) is None):
        raise ValueError(f"{model.name} is not built. Give it an Input, or call it on a batch of data first.")
    orders: dict[int, list[Order]] = {}
    shaping: dict[int, str] = {}
    follow(model, orders, shaping)
    layers_in_order = list(_Walk(orders, shaping).layers(model, in_graph=kinds.graph(model) is not None))
    return (parameter_map or ParameterMap()).arrange(layers_in_order, "keras")


class _Walk:
    """Lists the layers of a model."""

    def __init__(self, orders: dict[int, list[Order]], shaping: dict[int, str]) -> None:
        self._orders = orders
        self._shaping = shaping
        self._seen: set[int] = set()
        self._paths: dict[str, Any] = {}
        self._width: int | None = None  # channels or units of the last layer outside graphs
        self._maps = False  # True once a layer outside graphs has given feature maps

    def layers(self, layer: Any, in_graph: bool) -> Iterator[Layer]:
        if id(layer) in self._seen:
            return
        self._seen.add(id(layer))
        order = self._order(layer) if id(layer) in self._orders or in_graph else self._guess(layer)
        described = _describe(layer, order)
        if described is None:
            parts = _unknown(layer)
            if parts:
                yield Layer(layer.path or layer.name, type(layer).__name__, self._new(parts))
            if order.kind != "same" and id(layer) in self._orders and kinds.graph(layer) is None:
                self._maps, self._width = True, None  # the layers within may flatten a feature map, or take a flat one
            for child in kinds.children(layer):
                yield from self.layers(child, kinds.graph(layer) is not None)
            return
        for path, kind, parts in described:
            if id(layer) in self._shaping:
                parts = _refused(
                    parts,
                    f"Reshape {self._shaping[id(layer)]!r} makes a feature map of its outputs, which PyTorch has in "
                    "another order. Let a Conv2DTranspose make the map, on one of 1 x 1.",
                    "pair",
                )
            new = self._new(parts)
            if new:
                yield Layer(path, kind, new)

    def _order(self, layer: Any) -> Order:
        orders = self._orders.get(id(layer), [SAME])
        if any(order != orders[0] for order in orders):
            return Order("unknown", reason="it is used in several places, which give it features in several orders")
        return orders[0]

    def _guess(self, layer: Any) -> Order:
        """Return the order outside graphs.

        A kernel with as many rows as the last layer has channels takes no flattened feature map.
        """
        order = SAME
        if isinstance(layer, kinds.SPATIAL):
            self._maps = True
        if isinstance(layer, layers.Flatten):
            self._maps, self._width = True, None
        if isinstance(layer, layers.Dense):
            if self._maps and self._width != layer.kernel.shape[0]:
                reason = "it may take a flattened feature map, and a subclassed model does not tell its order"
                order = Order("unknown", reason=reason)
            self._width = layer.units
        filters: tuple[Any, ...] = (*kinds.CONVOLUTIONS, *kinds.TRANSPOSED, *kinds.SEPARABLE)
        if isinstance(layer, filters):
            self._width = layer.filters
        return order

    def _new(self, parts: Sequence[tuple[Any, Part]]) -> tuple[Part, ...]:
        """Leave out the variables that another layer has already."""
        new = [(variable, part) for variable, part in parts if id(variable) not in self._seen]
        for variable, part in new:
            if self._paths.setdefault(part.own, variable) is not variable:
                raise ValueError(f"two variables have the path {part.own}. Give their layers different names.")
        self._seen.update(id(variable) for variable, _ in new)
        return tuple(part for _, part in new)


Parts = list[tuple[Any, Part]]
"""Variables, and their form on the wire."""

Described = list[tuple[str, str, Parts]]
"""Per layer: path, kind, parts."""


def _part(name: str, variable: Any, view: View | None = None, note: str = "", role: Role | None = None) -> Parts:
    """Return a variable under its neutral name; an empty list if the layer has none."""
    if variable is None:
        return []
    view = view or View.same(variable.shape)
    role = role or ("parameter" if variable.trainable else "frozen")
    return [(variable, Part(name, role, str(variable.dtype), variable.path, view, note))]


def _of_features(parts: Parts, order: Order) -> Parts:
    """Note that the first axis of these is one of features, in this order."""
    result = []
    for variable, part in parts:
        part = replace(part, features=order.dims)
        if order.kind == "unknown":
            refusal = f"the order of its features can't be known: {order.reason}."
            part = replace(part, refusal=refusal, fix="orient")
        result.append((variable, part))
    return result


def _refused(parts: Parts, refusal: str, fix: Fix = "") -> Parts:
    return [(variable, replace(part, refusal=refusal, fix=fix)) for variable, part in parts]


def _describe(layer: Any, order: Order) -> Described | None:
    """Return a layer's parts; None for unknown layers, and for models."""
    if getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False):
        return None
    for types, describer in _DESCRIBERS:
        if isinstance(layer, types):
            return describer(layer, order) if layer.variables else []
    return None


def _transposed(variable: Any) -> View:
    return View.permute(variable.shape, (1, 0))


def _dense(layer: Any, order: Order) -> Described:
    kernel = _of_features(_part("weight", layer.kernel, _transposed(layer.kernel)), order)
    return [(layer.path, "linear", kernel + _part("bias", layer.bias))]


def _einsum_dense(layer: Any, order: Order) -> Described:
    """Describe an EinsumDense that is a Dense on the last axis, and refuse others."""
    inputs, _, rest = layer.equation.replace("...", "").replace(" ", "").partition(",")
    kernel, _, outputs = rest.partition("->")
    simple = len(kernel) == 2 and inputs[-1:] == kernel[0] and outputs == inputs[:-1] + kernel[1]
    bias = layer.bias
    if simple and (bias is None or len(bias.shape) == 1):
        return _dense(layer, order)
    refusal = f"an EinsumDense must be a Dense on the last axis, and {layer.equation!r} is another."
    return [(layer.path, "linear", _refused(_part("weight", layer.kernel) + _part("bias", bias), refusal, "pair"))]


def _conv_view(kernel: Any) -> View:
    """Return the view: Keras (*places, in / groups, out), PyTorch (out, in / groups, *places).

    Transposed ones have in and out exchanged in both.
    """
    last = len(kernel.shape) - 1
    return View.permute(kernel.shape, (last, last - 1, *range(last - 1)))


def _depthwise_view(kernel: Any) -> View:
    """Return the view: Keras (*places, in, multiplier), PyTorch (in * multiplier, 1, *places)."""
    *places, n, multiplier = kernel.shape
    last = len(places)
    return View.permute(kernel.shape, (last, last + 1, *range(last)), (n * multiplier, 1, *places))


def _conv(layer: Any, order: Order) -> Described:
    return [(layer.path, "conv", _part("weight", layer.kernel, _conv_view(layer.kernel)) + _part("bias", layer.bias))]


def _conv_transpose(layer: Any, order: Order) -> Described:
    weight = _part("weight", layer.kernel, _conv_view(layer.kernel))
    return [(layer.path, "conv_transpose", weight + _part("bias", layer.bias))]


def _depthwise(layer: Any, order: Order) -> Described:
    weight = _part("weight", layer.kernel, _depthwise_view(layer.kernel))
    return [(layer.path, "conv", weight + _part("bias", layer.bias))]


def _separable(layer: Any, order: Order) -> Described:
    """Describe two layers, as PyTorch has them: a depthwise convolution without a bias, and one of size 1."""
    depthwise = _part("weight", layer.depthwise_kernel, _depthwise_view(layer.depthwise_kernel))
    pointwise = _part("weight", layer.pointwise_kernel, _conv_view(layer.pointwise_kernel))
    return [
        (f"{layer.path}/depthwise", "conv", depthwise),
        (f"{layer.path}/pointwise", "conv", pointwise + _part("bias", layer.bias)),
    ]


def _batch_norm(layer: Any, order: Order) -> Described:
    note = f"eps {layer.epsilon:g}"
    role: Role = "statistic" if layer.trainable else "frozen"
    parts = _part("weight", layer.gamma, note=note) + _part("bias", layer.beta, note=note)
    parts += _part("mean", layer.moving_mean, note=note, role=role)
    parts += _part("variance", layer.moving_variance, note=note, role=role)
    parts = _of_features(parts, order)
    if layer.renorm:
        parts = _refused(parts, "PyTorch has no batch renormalization (renorm=True).")
    return [(layer.path, "batch_norm", parts)]


def _norm(kind: str) -> Callable[[Any, Order], Described]:
    def describe(layer: Any, order: Order) -> Described:
        note = f"eps {layer.epsilon:g}" + (f", groups {layer.groups}" if kind == "group_norm" else "")
        parts = _part("weight", layer.gamma, note=note) + _part("bias", layer.beta, note=note)
        if any(len(variable.shape) > 1 for variable, _ in parts):
            refusal = "it normalises over several axes, whose order in PyTorch can't be known."
            parts = _refused(parts, refusal, "pair")
        elif kind == "group_norm" and order.kind == "flat" and layer.groups != 1:
            parts = _refused(parts, "its groups are other features of a flattened map in PyTorch.")
        else:
            parts = _of_features(parts, order)
        if getattr(layer, "rms_scaling", False):
            parts = _refused(parts, "PyTorch's LayerNorm has no rms_scaling.")
        return [(layer.path, kind, parts)]

    return describe


def _embedding(layer: Any, order: Order) -> Described:
    parts = _part("weight", layer.embeddings)
    reverse = getattr(layer, "reverse_embeddings", None)
    if reverse is None:
        return [(layer.path, "embedding", parts)]
    untied = _part("weight", reverse, _transposed(reverse))
    return [(layer.path, "embedding", parts), (f"{layer.path}/reverse", "linear", untied)]


def _recurrent(layer: Any, order: Order) -> Described | None:
    cell = getattr(layer, "cell", layer)
    lstm, gru = isinstance(cell, layers.LSTMCell), isinstance(cell, layers.GRUCell)
    if not lstm and not gru:
        return None
    parts = _lstm(cell) if lstm else _gru(cell)
    names = [getattr(function, "__name__", str(function)) for function in (cell.activation, cell.recurrent_activation)]
    if names != ["tanh", "sigmoid"]:
        parts = _refused(parts, f"PyTorch's has the activations tanh and sigmoid, this one has {' and '.join(names)}.")
    kind = ("lstm" if lstm else "gru") + ("_reverse" if getattr(layer, "go_backwards", False) else "")
    return [(layer.path, kind, parts)]


def _lstm(cell: Any) -> Parts:
    """List an LSTM's variables; both frameworks have the gates in the same order: input, forget, cell, output."""
    parts = _part("weight_ih", cell.kernel, _transposed(cell.kernel))
    parts += _part("weight_hh", cell.recurrent_kernel, _transposed(cell.recurrent_kernel))
    return parts + _part("bias", cell.bias)


def _gru(cell: Any) -> Parts:
    """List a GRU's variables; the gates r, z, n of PyTorch are z, r, h in Keras, so each travels by itself."""
    n, parts = cell.units, []
    columns = {"r": (n, 2 * n), "z": (0, n), "n": (2 * n, 3 * n)}
    for kind, kernel in (("weight_ih", cell.kernel), ("weight_hh", cell.recurrent_kernel)):
        rows = kernel.shape[0]
        for gate, place in columns.items():
            view = View(tuple(kernel.shape), (rows, n), (1, 0), (n, rows), ((0, rows), place))
            parts += _part(f"{kind}.{gate}", kernel, view)
    if cell.bias is not None and cell.reset_after:
        for row, kind in enumerate(("bias_ih", "bias_hh")):
            for gate, place in columns.items():
                view = View(tuple(cell.bias.shape), (1, n), (0, 1), (n,), ((row, row + 1), place))
                parts += _part(f"{kind}.{gate}", cell.bias, view)
    if not cell.reset_after:
        parts = _refused(parts, "PyTorch's GRU resets after the matrix product. Build this one with reset_after=True.")
    return parts


def _bidirectional(layer: Any, order: Order) -> Described | None:
    described = []
    for direction in (layer.forward_layer, layer.backward_layer):
        layers_within = _recurrent(direction, order)
        if layers_within is None:
            return None
        for path, kind, parts in layers_within:
            if layer.merge_mode != "concat":
                parts = _refused(parts, f"PyTorch joins both directions; this one has merge_mode={layer.merge_mode!r}.")
            described.append((path, kind, parts))
    return described


def _attention(layer: Any, order: Order) -> Described:
    note, parts = f"heads {layer.num_heads}", []
    for name in ("query", "key", "value"):
        dense = getattr(layer, f"{name}_dense")
        n, heads, dim = dense.kernel.shape
        parts += _part(f"{name}.weight", dense.kernel, View.permute((n, heads, dim), (1, 2, 0), (heads * dim, n)), note)
        if dense.bias is not None:
            parts += _part(f"{name}.bias", dense.bias, View.permute((heads, dim), (0, 1), (heads * dim,)), note)
    dense = layer.output_dense
    heads, dim, *out = dense.kernel.shape
    if len(out) == 1:
        view = View.permute(dense.kernel.shape, (2, 0, 1), (*out, heads * dim))
        parts += _part("out.weight", dense.kernel, view, note) + _part("out.bias", dense.bias, note=note)
    else:
        parts = _refused(parts, f"PyTorch's attention gives vectors, this one an output_shape of {tuple(out)}.")
    if getattr(layer, "_use_gate", False):
        parts = _refused(parts, "PyTorch's MultiheadAttention has no gate (use_gate=True).")
    return [(layer.path, "attention", parts)]


_DESCRIBERS: tuple[tuple[tuple[Any, ...], Callable[[Any, Order], Described | None]], ...] = (
    ((layers.Dense,), _dense),
    ((layers.EinsumDense,), _einsum_dense),
    (kinds.SEPARABLE, _separable),
    (kinds.DEPTHWISE, _depthwise),
    (kinds.TRANSPOSED, _conv_transpose),
    (kinds.CONVOLUTIONS, _conv),
    ((layers.BatchNormalization,), _batch_norm),
    ((layers.LayerNormalization,), _norm("layer_norm")),
    ((layers.GroupNormalization,), _norm("group_norm")),
    ((layers.Embedding,), _embedding),
    ((layers.Bidirectional,), _bidirectional),
    ((layers.RNN, layers.LSTMCell, layers.GRUCell), _recurrent),
    ((layers.MultiHeadAttention,), _attention),
)


def _unknown(layer: Any) -> Parts:
    """List the variables of a layer itself, not of those within it."""
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    trained = [p for v in layer._trainable_variables for p in _part(v.name, v)]
    parts = _refused(trained, f"{name} is not a layer whose PyTorch form is known.", "pair")
    for variable in layer._non_trainable_variables:
        if not str(variable.dtype).startswith(("float", "bfloat")):
            continue
        text = f"a variable of {name} that is not trained, whose PyTorch form is not known. Give it as a "
        text += "pair to average it, or as ParameterMap(ignore=[...]) to let it stay each worker's own."
        parts += _refused(_part(variable.name, variable, role="statistic"), text, "pair")
    return parts
