"""The core's vectors on Keras: variables, gathered into flat chunks and scattered back, in traces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from hvd_slowmo.boxes import boxes
from hvd_slowmo.layout import Chunk, Entry, Layout, Tensor, arrange
from hvd_slowmo_tf.inner import Inner


@dataclass(frozen=True)
class Plan:
    """The layout of a model and, per segment, its variables."""

    layout: Layout
    variables: tuple[tuple[Any, ...], ...]


def lay_out(parameters: Sequence[Any], statistics: Sequence[Any], buffers: Sequence[Any]) -> Plan:
    """Parameters, the model's statistics, and the inner optimizer's buffers where they are averaged.

    Statistics travel as float64: the mean of equal values is then that value.

    Raises:
        TypeError: complex or integer parameters.
        ValueError: no parameter with an element.
    """
    tensors: list[Tensor[Any]] = []
    for rule, variables in (("slow", parameters), ("mean", statistics), ("base", buffers)):
        for v in variables:
            own = tf.as_dtype(v.dtype)
            if not own.is_floating:
                raise TypeError(f"{v.path} has type {own.name}; SlowMo averages real floating-point variables only.")
            wire = tf.float64 if rule == "mean" else wire_dtype(own)
            entry = Entry(_common_path(v.path), tuple(v.shape), own.name)
            tensors.append(Tensor(rule, entry, wire.name, wire.size, native(v).device, v))
    laid, places = arrange(tensors, 1)
    if all(chunk.rule != "slow" for chunk in laid.chunks):
        raise ValueError("the optimizer has no variable with an element.")
    return Plan(laid, places)


def wire_dtype(dtype: Any) -> Any:
    """The type in which a variable travels and in which its anchor and v are kept."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def native(variable: Any) -> Any:
    """The tf.Variable of a Keras variable, whatever policy is in force."""
    return getattr(variable, "_value", variable)


def _common_path(path: str) -> str:
    """Without the numbers that Keras gives names that it has seen before: workers may have built other models too."""
    return re.sub(r"_\d+(?=/|$)", "", path)


class TfStore:
    """`hvd_slowmo.machine.Store` on Keras variables.

    vectors: per name, a flat variable for each segment of parameters.
    """

    def __init__(self, plan: Plan, inner: Inner, vectors: dict[str, list[Any]]) -> None:
        self.layout = plan.layout
        self._variables = plan.variables
        self._inner = inner
        slow = [number for number, segment in enumerate(plan.layout.segments) if segment.rule == "slow"]
        self._vectors = {name: dict(zip(slow, flats, strict=True)) for name, flats in vectors.items()}
        self.parameters = [v for number in slow for v in plan.variables[number]]
        self._gradients: dict[int, Any] = {}
        self._written: dict[int, list[Any]] = {}
        self.counts: Any = None  # per parameter, how many workers have a gradient
        with tf.init_scope():
            self._nothing = tf.Variable(0.0, dtype=tf.float64, trainable=False)

    def set_gradients(self, gradients: Sequence[Any]) -> None:
        """What `read` gives as "gradient": for each of `parameters`, a tensor or None."""
        self._gradients = {id(v): g for v, g in zip(self.parameters, gradients, strict=True) if g is not None}
        self._written = {}

    def gradients(self) -> list[Any]:
        """What has been written as "gradient", for each of `parameters`."""
        return [tf.reshape(tf.concat(self._written[id(v)], 0), v.shape) for v in self.parameters]

    def read(self, vector: str, chunk: Chunk) -> Any:
        if vector in self._vectors:
            return native(self._vectors[vector][chunk.segment])[chunk.start : chunk.stop]
        wire = tf.as_dtype(self.layout.segments[chunk.segment].dtype)
        parts = []
        for v, start, stop, _ in self._spans(chunk):
            if vector == "model":
                parts.append(tf.reshape(native(v).read_value(), [-1])[start:stop])
            elif id(v) in self._gradients:
                parts.append(tf.reshape(self._gradients[id(v)], [-1])[start:stop])
            else:
                parts.append(tf.zeros([stop - start], v.dtype))
        return tf.concat([tf.cast(part, wire) for part in parts], 0)

    def write(self, vector: str, chunk: Chunk, value: Any) -> None:
        if vector in self._vectors:
            flat = native(self._vectors[vector][chunk.segment])
            if chunk.size == flat.shape[0]:
                flat.assign(value)
            else:
                flat[chunk.start : chunk.stop].assign(value)
            return
        for v, start, stop, at in self._spans(chunk):
            part = tf.cast(value[at : at + stop - start], v.dtype)
            if vector == "gradient":
                # Chunks come from the last to the first.
                self._written.setdefault(id(v), []).insert(0, part)
            elif stop - start == v.shape.num_elements():
                native(v).assign(tf.reshape(part, v.shape))
            else:
                for box, count in boxes(tuple(v.shape), start, stop):
                    target = native(v)[box]
                    target.assign(tf.reshape(part[:count], target.shape))
                    part = part[count:]

    def written(self, chunk: Chunk, anchor: Any) -> Any:
        own = tf.as_dtype(self.layout.segments[chunk.segment].entries[0].dtype)
        return anchor if own == anchor.dtype else tf.cast(tf.cast(anchor, own), anchor.dtype)

    def zeros(self, chunk: Chunk) -> Any:
        dtype = self.layout.segments[chunk.segment].dtype
        return tf.fill([chunk.size], tf.cast(self._nothing.read_value(), dtype))  # not a constant, see effects.py

    def present(self) -> Any:
        return [1.0 if id(v) in self._gradients else 0.0 for v in self.parameters]

    def admit(self, counts: Any) -> None:
        self.counts = counts

    def finite(self) -> Any:
        watched = [*self.parameters]
        for segment, variables in zip(self.layout.segments, self._variables, strict=True):
            if segment.rule == "mean":
                watched += [v for v in variables if v.name in ("moving_mean", "moving_variance")]
        return tf.reduce_all([tf.reduce_all(tf.math.is_finite(native(v).read_value())) for v in watched])

    def reset_base(self) -> None:
        self._inner.reset()

    def _spans(self, chunk: Chunk) -> Any:
        variables = self._variables[chunk.segment]
        for number, start, stop, at in self.layout.spans(chunk):
            yield variables[number], start, stop, at
