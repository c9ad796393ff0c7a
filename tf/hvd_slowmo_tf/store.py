"""The core's vectors on Keras: variables, gathered into flat chunks and scattered back, in traces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

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
            entry = Entry(common_path(v.path), tuple(v.shape), own.name)
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


def common_path(path: str) -> str:
    """Without the numbers that Keras gives names that it has seen before: workers may have built other models too."""
    return re.sub(r"_\d+(?=/|$)", "", path)


class TfStore:
    """`hvd_slowmo.machine.Store` on Keras variables.

    No variable is ever assigned in part: from then on TensorFlow would copy the whole of it whenever it is read, by the
    model's layers too. Stretches are kept until all of a variable are there; until then it has its old values.

    vectors: per name, a variable for each chunk of parameters.
    """

    def __init__(self, plan: Plan, inner: Inner, vectors: dict[str, list[Any]]) -> None:
        self.layout = plan.layout
        self._variables = plan.variables
        self._inner = inner
        slow = [chunk.index for chunk in plan.layout.chunks if chunk.rule == "slow"]
        self._vectors = {name: dict(zip(slow, parts, strict=True)) for name, parts in vectors.items()}
        laid = zip(plan.layout.segments, plan.variables, strict=True)
        self.parameters = [v for segment, variables in laid if segment.rule == "slow" for v in variables]
        self._gradients: dict[int, Any] = {}
        self._averaged: dict[int, Any] = {}
        self._stretches: dict[tuple[str, int], dict[int, Any]] = {}  # by where they begin, of what is not whole yet
        self.counts: Any = None  # per parameter, how many workers have a gradient
        with tf.init_scope():
            self._nothing = tf.Variable(0.0, dtype=tf.float64, trainable=False)

    def set_gradients(self, gradients: Sequence[Any]) -> None:
        """What `read` gives as "gradient": for each of `parameters`, a tensor or None."""
        self._gradients = {id(v): g for v, g in zip(self.parameters, gradients, strict=True) if g is not None}
        self._averaged = {}

    def gradients(self) -> list[Any]:
        """What has been written as "gradient", for each of `parameters`."""
        return [self._averaged.get(id(v), tf.zeros(v.shape, v.dtype)) for v in self.parameters]

    def read(self, vector: str, chunk: Chunk) -> Any:
        if vector in self._vectors:
            begin = chunk.start - self.layout.chunks[chunk.index].start
            return native(self._vectors[vector][chunk.index]).read_value()[begin : begin + chunk.size]
        wire = tf.as_dtype(self.layout.segments[chunk.segment].dtype)
        parts = []
        for v, start, stop, _ in self._spans(chunk):
            if vector == "model":
                parts.append(tf.reshape(native(v).read_value(), [-1])[start:stop])
            elif id(v) in self._gradients:
                parts.append(tf.reshape(self._gradients[id(v)], [-1])[start:stop])
            else:
                parts.append(tf.zeros([stop - start], v.dtype))
        return _joined([tf.cast(part, wire) for part in parts])

    def write(self, vector: str, chunk: Chunk, value: Any) -> None:
        if vector in self._vectors:
            v = self._vectors[vector][chunk.index]
            whole = self._whole(vector, v, chunk.start - self.layout.chunks[chunk.index].start, value)
            if whole is not None:
                native(v).assign(whole)
            return
        for v, start, stop, at in self._spans(chunk):
            whole = self._whole(vector, v, start, tf.cast(value[at : at + stop - start], v.dtype))
            if whole is not None and vector == "gradient":
                self._averaged[id(v)] = whole
            elif whole is not None:
                native(v).assign(whole)

    def _whole(self, vector: str, v: Any, start: int, stretch: Any) -> Any:
        """All of a variable's new value, in its shape, once the last stretch of it is here; None before."""
        stretches = self._stretches.setdefault((vector, id(v)), {})
        stretches[start] = stretch
        if sum(part.shape[0] for part in stretches.values()) < v.shape.num_elements():
            return None
        del self._stretches[vector, id(v)]
        return tf.reshape(_joined([stretches[at] for at in sorted(stretches)]), v.shape)

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


def _joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)
