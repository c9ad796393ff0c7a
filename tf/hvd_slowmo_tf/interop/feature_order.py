"""The order of the features of each tensor of a Keras graph, compared with PyTorch's.

Keras keeps the channels of a feature map last and PyTorch first, so a flattened one has another order, and with it the
rows of the kernel that takes it. Orders are followed through the graph of a Sequential or functional model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import keras

from hvd_slowmo_tf.interop import layer_types as kinds


@dataclass(frozen=True)
class Order:
    """The order of a tensor's elements.

    Attributes:
        kind: "same" as PyTorch's; "channels": a feature map, which PyTorch has channels first; "flat": a flattened
            feature map of shape `dims`, channels last; "axes": of several axes whose order in PyTorch is not known, the
            last one the same; "unknown": for the reason given.
    """

    kind: Literal["same", "channels", "flat", "axes", "unknown"]
    dims: tuple[int, ...] = ()
    reason: str = ""


SAME, CHANNELS, AXES = Order("same"), Order("channels"), Order("axes")
_HIDDEN = Order("unknown", reason="they may be a flattened feature map, which a subclassed model does not tell")


def follow(model: Any, orders: dict[int, list[Order]], shaping: dict[int, str]) -> list[Order]:
    """Write into `orders`, per id of a layer, the order of its input at each of its calls.

    And into `shaping`, per id of a layer of whose outputs a Reshape makes a feature map, the Reshape's name: PyTorch
    has these outputs in another order. Layers within models without a graph (subclassed ones) are left out.

    Returns:
        The orders of the model's outputs; an empty list for a model without a graph.
    """
    graph = kinds.graph(model)
    if graph is not None:
        return _through(graph, input_orders(graph), orders, shaping)
    has_maps = any(isinstance(layer, (*kinds.SPATIAL, keras.layers.Flatten)) for layer in model._flatten_layers())
    for layer in kinds.children(model):
        inner = kinds.graph(layer)
        if inner is not None:
            inputs = [
                _HIDDEN if has_maps and len(tensor.shape) == 2 else order
                for tensor, order in zip(inner._inputs, input_orders(inner), strict=True)
            ]
            _through(inner, inputs, orders, shaping)
        else:
            follow(layer, orders, shaping)
    return []


def input_orders(graph: Any) -> list[Order]:
    """Return the orders of a graph's inputs, by the layers that use them.

    Where no layer tells, a batch of images has channels, and three axes may be a sequence or a feature map.
    """
    orders = []
    for tensor in graph._inputs:
        rank = len(tensor.shape)
        guess = SAME if rank <= 2 else AXES if rank == 3 else CHANNELS
        orders.append((_by_users(graph, tensor) or guess) if rank > 2 else guess)
    return orders


def feature_maps(model: Any) -> tuple[list[bool], list[bool]]:
    """Return, per input and per output, whether PyTorch has it channels first; empty lists without a graph."""
    graph = kinds.graph(model)
    inputs = input_orders(graph) if graph is not None else []
    return [order == CHANNELS for order in inputs], [order == CHANNELS for order in follow(model, {}, {})]


def _by_users(graph: Any, tensor: Any) -> Order | None:
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            place = next((n for n, taken in enumerate(node.input_tensors) if taken is tensor), None)
            if node.is_input or place is None:
                continue
            inner = kinds.graph(node.operation)
            if inner is not None:
                order = _by_users(inner, inner._inputs[place])
            elif isinstance(node.operation, kinds.SPATIAL):
                return CHANNELS if node.operation.data_format == "channels_last" else SAME
            elif isinstance(node.operation, kinds.OF_SEQUENCES):
                return SAME
            else:
                elementwise = isinstance(node.operation, kinds.ELEMENTWISE)
                order = _by_users(graph, node.outputs[0]) if elementwise else None
            if order is not None:
                return order
    return None


@dataclass(frozen=True)
class _Made:
    """The layers whose units a tensor's features are, and the Reshape that makes a map of them, if one has."""

    layers: tuple[Any, ...] = ()
    reshape: str = ""

    def behind(self, operation: Any, shape: tuple[Any, ...], target: tuple[Any, ...]) -> _Made:
        """Return the same of an operation's output; the shapes are those of its input and output."""
        if isinstance(operation, keras.layers.Dense) and len(shape) == 2:
            return _Made((operation,))
        if isinstance(operation, keras.layers.Reshape):
            is_map = len(shape) == 2 and len(target) > 2 and target[-1] != 1 and math.prod(target[1:-1]) != 1
            return _Made(self.layers, operation.name) if is_map else _Made()
        if isinstance(operation, kinds.ELEMENTWISE):
            own = () if self.reshape or not self.layers else (operation,)  # behind it, a value per channel
            return _Made((*self.layers, *own), self.reshape)
        return self if type(operation).__name__ in kinds.ELEMENTWISE_OPERATIONS else _Made()


def _through(
    graph: Any, graph_inputs: list[Order], orders: dict[int, list[Order]], shaping: dict[int, str]
) -> list[Order]:
    made: dict[int, _Made] = {}
    order_of = {id(tensor): order for tensor, order in zip(graph._inputs, graph_inputs, strict=True)}
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input:
                continue
            inputs = [order_of.get(id(tensor), SAME) for tensor in node.input_tensors]
            shapes = [tuple(tensor.shape) for tensor in node.input_tensors]
            orders.setdefault(id(node.operation), []).append(inputs[0])
            inner = kinds.graph(node.operation)
            before = next((made[id(tensor)] for tensor in node.input_tensors if id(tensor) in made), _Made())
            if before.reshape and isinstance(node.operation, kinds.SPATIAL) and inputs[0] == SAME:
                last = node.operation.data_format == "channels_last"
                shaping.update({id(layer): before.reshape for layer in before.layers if last})
            made.update(
                {id(tensor): before.behind(node.operation, shapes[0], tuple(tensor.shape)) for tensor in node.outputs}
            )
            if inner is not None:
                results = _through(inner, inputs, orders, shaping)
            else:
                results = [_after(node.operation, inputs, shapes)] * len(node.outputs)
            order_of.update({id(tensor): order for tensor, order in zip(node.outputs, results, strict=True)})
    return [order_of.get(id(tensor), SAME) for tensor in graph._outputs]


def _after(operation: Any, inputs: list[Order], shapes: list[tuple[Any, ...]]) -> Order:
    """Return the order of an operation's output."""
    order, shape = inputs[0], shapes[0]
    name = type(operation).__name__
    if isinstance(operation, kinds.SPATIAL):
        return CHANNELS if operation.data_format == "channels_last" else SAME
    if isinstance(operation, kinds.OF_SEQUENCES) or name.startswith("Global"):
        return SAME
    if isinstance(operation, (keras.layers.Dense, keras.layers.EinsumDense)):
        return order if len(shape) > 2 else SAME
    if isinstance(operation, kinds.ELEMENTWISE) or name in kinds.ELEMENTWISE_OPERATIONS:
        return order if all(other == order for other in inputs) else _lost(operation, "its inputs have several orders")
    if isinstance(operation, keras.layers.Concatenate):
        last = operation.axis in (-1, len(shape) - 1)
        kept = all(other == order for other in inputs) and order.kind in ("same", "channels", "axes")
        return order if kept and (last or order.kind != "channels") else _lost(operation, "it joins feature maps")
    if isinstance(operation, keras.layers.Flatten):
        if operation.data_format == "channels_first" and order == SAME and len(shape) > 2:
            return _flat((*shape[2:], shape[1]))  # Keras puts the channels last first
        return _flattened(operation, order, shape)
    if isinstance(operation, keras.layers.Reshape) and len(operation.target_shape) == 1:
        return _flattened(operation, order, shape)
    if isinstance(operation, keras.layers.Reshape) and order == SAME:
        return SAME
    return _lost(operation, "its effect on the order of features is not known")


def _flattened(operation: Any, order: Order, shape: tuple[Any, ...]) -> Order:
    if len(shape) <= 2 or order.kind in ("same", "unknown"):
        return order
    if None in shape[1:]:
        return _lost(operation, f"it flattens a shape that is not fixed, {shape}")
    if order == AXES and min(math.prod(shape[1:-1]), shape[-1]) > 1:
        return _lost(operation, f"it flattens {shape[1:]}, which may be a sequence or a feature map")
    return _flat(shape[1:])


def _flat(dims: tuple[int, ...]) -> Order:
    # With one channel, or of one place, both orders are the same.
    return SAME if dims[-1] == 1 or math.prod(dims[:-1]) == 1 else Order("flat", tuple(dims))


def _lost(operation: Any, reason: str) -> Order:
    return Order("unknown", reason=f"{type(operation).__name__} {operation.name!r} comes before: {reason}")
