"""Which variables of a Keras model travel, in which order, and where they are found."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from hvd_slowmo.core.layout import Entry, Layout, Tensor, arrange
from hvd_slowmo.core.startup import Groups
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo.wire.tensors import TensorSpec
from hvd_slowmo.wire.views import View
from hvd_slowmo_tf.interop.layers import entries_keras
from hvd_slowmo_tf.interop.weights import variables_of


class Place(NamedTuple):
    """Where a tensor of the layout is: all of a variable or a part of it, as the view has it."""

    variable: Any
    view: View


@dataclass(frozen=True)
class Plan:
    """The layout of a model and, per segment, where its tensors are."""

    layout: Layout
    places: tuple[tuple[Place, ...], ...]

    @property
    def variables(self) -> list[Any]:
        """All that travel, each once."""
        found = {id(place.variable): place.variable for places in self.places for place in places}
        return list(found.values())


Placed = list[tuple[TensorSpec, Any]]
"""Entries and their variables."""


def entries_of(parameters: Sequence[Any], statistics: Sequence[Any]) -> Placed:
    """What takes part without a map: variables as they are."""
    return [*_entries("slow", parameters), *_entries("mean", statistics)]


def _entries(rule: str, variables: Sequence[Any]) -> Placed:
    return [
        (TensorSpec(common_path(v.path), rule, tuple(v.shape), _own(v), View.same(tuple(v.shape)), v.path), v)
        for v in variables
    ]


def mapped(model: Any, parameter_map: ParameterMap, parameters: Sequence[Any]) -> Placed:
    """What takes part with a map.

    Args:
        model: the model.
        parameters: what the optimizer trains.

    Raises:
        ValueError: what `ParameterMap` refuses, or the optimizer does not train what the model does.
    """
    known = variables_of(model)
    placed = [(entry, known[entry.own]) for entry in entries_keras(model, parameter_map)]
    trained = {id(v): v for entry, v in placed if entry.rule == "slow"}
    mine = {id(v): v for v in parameters}
    apart = [v.path for key, v in (trained | mine).items() if key not in trained or key not in mine]
    if apart:
        raise ValueError(
            "with a parameter_map the optimizer must train what the model does, and that differs for "
            f"{', '.join(apart)}. Freeze layers before the optimizer is built."
        )
    for key, v in trained.items():
        held = sum(entry.size for entry, other in placed if id(other) == key)
        if held != math.prod(v.shape):
            raise ValueError(f"the ParameterMap shows a part of {v.path} only: give a View of all of it.")
    return placed


def lay_out(placed: Placed, buffers: Sequence[Any], groups: Groups | None, one_device: bool = False) -> Plan:
    """The trained and averaged entries, and the inner optimizer's buffers where they are averaged.

    Statistics travel as float64: the mean of equal values is then that value.

    Args:
        groups: the common groups; None for one.
        one_device: whatever devices the variables are on, which on the wire of a map must not count.

    Raises:
        TypeError: complex or integer parameters.
        ValueError: no parameter with an element.
    """
    numbers = iter(groups.of) if groups else None
    tensors: list[Tensor[Place]] = []
    for entry, v in [*placed, *_entries("base", buffers)]:
        if entry.rule == "frozen":
            continue
        own = tf.as_dtype(v.dtype)
        if not own.is_floating:
            raise TypeError(f"{v.path} has type {own.name}; SlowMo averages real floating-point variables only.")
        wire = tf.float64 if entry.rule == "mean" else wire_dtype(own)
        group = next(numbers) if numbers is not None and entry.rule == "slow" else 0
        device = "" if one_device else native(v).device
        laid = Entry(entry.name, entry.shape, own.name, group)
        tensors.append(Tensor(entry.rule, laid, wire.name, wire.size, device, Place(v, entry.view)))
    laid_out, places = arrange(tensors, len(groups.own) if groups else 1)
    if all(chunk.rule != "slow" for chunk in laid_out.chunks):
        raise ValueError("the optimizer has no variable with an element.")
    return Plan(laid_out, places)


def wire_dtype(dtype: Any) -> Any:
    """The type in which a variable travels and in which its anchor and v are kept."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def native(variable: Any) -> Any:
    """The tf.Variable of a Keras variable, whatever policy is in force."""
    return getattr(variable, "_value", variable)


def parts_of(model: Any) -> tuple[list[Any], list[Any]]:
    """A model's variables without those of its metrics, and those of them that are averaged without being trained."""
    statistics = [
        v
        for layer in model._flatten_layers()
        if layer.trainable  # what belongs to a frozen layer stays as it is
        for v in layer._non_trainable_variables
    ]
    metrics = {id(v) for metric in model.metrics for v in metric.variables}
    return [v for v in model.variables if id(v) not in metrics], [v for v in statistics if id(v) not in metrics]


def _own(v: Any) -> str:
    name: str = tf.as_dtype(v.dtype).name
    return name


def common_path(path: str) -> str:
    """Without the numbers that Keras gives names that it has seen before: workers may have built other models too."""
    return re.sub(r"_\d+(?=/|$)", "", path)
