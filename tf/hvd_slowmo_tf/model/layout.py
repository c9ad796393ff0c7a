"""The variables of a Keras model that travel: their order, and where they are found."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import keras
import tensorflow as tf

from hvd_slowmo.core.parts.layout import ModelLayout, Stretch
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo.wire.tensors import Role, TensorSpec
from hvd_slowmo.wire.views import View
from hvd_slowmo_tf.interop.layers import entries_keras
from hvd_slowmo_tf.interop.weights import variables_of


@dataclass(frozen=True, eq=False)
class VariableRef:
    """A tensor of the wire, and the variable that it is a part, or all, of."""

    spec: TensorSpec
    variable: keras.Variable
    device: str  # empty with a ParameterMap, where devices must not change the messages


KerasLayout = ModelLayout[VariableRef]


def refs_of(role: Role, variables: Sequence[keras.Variable], one_device: bool) -> list[VariableRef]:
    """Return variables as they are, each a tensor of its own.

    Raises:
        TypeError: a variable that is not of a real floating-point type.
    """
    found = []
    for v in variables:
        shape = tuple(v.shape)
        spec = TensorSpec(common_path(v.path), role, shape, _floating(v), View.same(shape), v.path)
        found.append(VariableRef(spec, v, "" if one_device else native(v).device))
    return found


def mapped_refs(
    model: keras.Model, parameter_map: ParameterMap, trained: Sequence[keras.Variable]
) -> list[VariableRef]:
    """Return the tensors of a built model in the names and shapes that a map gives them.

    Raises:
        TypeError: a variable that is not of a real floating-point type.
        ValueError: the map does not fit the model, or `trained` are not the model's trainable variables.
    """
    known = variables_of(model)
    refs = [VariableRef(spec, known[spec.own], "") for spec in entries_keras(model, parameter_map)]
    in_model = {id(ref.variable): ref.variable for ref in refs if ref.spec.role == "parameter"}
    in_optimizer = {id(v): v for v in trained}
    differing = [v.path for key, v in (in_model | in_optimizer).items() if (key in in_model) != (key in in_optimizer)]
    if differing:
        raise ValueError(
            "with a parameter_map the optimizer must train what the model does, and that differs for "
            f"{', '.join(differing)}. Freeze layers before the optimizer is built."
        )
    for key, v in in_model.items():
        if sum(ref.spec.size for ref in refs if id(ref.variable) == key) != math.prod(v.shape):
            raise ValueError(f"the ParameterMap shows a part of {v.path} only: give a View of all of it.")
    for ref in refs:
        if ref.spec.role != "frozen":
            _floating(ref.variable)
    return refs


def spans(layout: KerasLayout, stretch: Stretch) -> Iterator[tuple[VariableRef, int, int, int]]:
    """Yield the tensors under a stretch: (ref, from, to in the tensor, place in the stretch)."""
    refs = layout.refs[stretch.segment]
    for number, start, stop, at in layout.layout.spans(stretch):
        yield refs[number], start, stop, at


def travelling(layout: KerasLayout) -> list[keras.Variable]:
    """Return all variables of a layout, each once."""
    return list({id(ref.variable): ref.variable for refs in layout.refs for ref in refs}.values())


def native(variable: keras.Variable) -> tf.Variable:
    """Return the tf.Variable of a Keras variable, whatever dtype policy is in force."""
    return getattr(variable, "_value", variable)


def parts_of(model: keras.Model) -> tuple[list[keras.Variable], list[keras.Variable]]:
    """Return a model's variables without those of its metrics, and among them the statistics of unfrozen layers."""
    statistics = [
        v
        for layer in model._flatten_layers()
        if layer.trainable  # a frozen layer's stay as they are
        for v in layer._non_trainable_variables
    ]
    metrics = {id(v) for metric in model.metrics for v in metric.variables}
    return [v for v in model.variables if id(v) not in metrics], [v for v in statistics if id(v) not in metrics]


def common_path(path: str) -> str:
    """Return a path without the numbers that Keras appends to names it has seen: workers may have built other models.

    Example:
        >>> common_path("sequential_3/dense_12/kernel")
        'sequential/dense/kernel'
    """
    return re.sub(r"_\d+(?=/|$)", "", path)


def _floating(v: keras.Variable) -> str:
    dtype = tf.as_dtype(v.dtype)
    if not dtype.is_floating:
        raise TypeError(f"{v.path} has type {dtype.name}; SlowMo averages real floating-point variables only.")
    return str(dtype.name)
