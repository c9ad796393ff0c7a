"""The core's vectors on Keras: variables, gathered into flat chunks and scattered back, in traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from hvd_slowmo.core.layout import Chunk
from hvd_slowmo.wire.views import View
from hvd_slowmo_tf.inner_optimizer import Inner
from hvd_slowmo_tf.layout import Place, Plan, native


class TfStore:
    """`hvd_slowmo.core.machine.Store` on Keras variables.

    No variable is ever assigned in part: from then on TensorFlow would copy the whole of it whenever it is read, by the
    model's layers too. Stretches are kept until all of a variable are there; until then it has its old values.

    vectors: per name, a variable for each chunk of parameters.
    """

    def __init__(self, plan: Plan, inner: Inner, vectors: dict[str, list[Any]]) -> None:
        self.layout = plan.layout
        self._places = plan.places
        self._inner = inner
        slow = [chunk.index for chunk in plan.layout.chunks if chunk.rule == "slow"]
        self._vectors = {name: dict(zip(slow, parts, strict=True)) for name, parts in vectors.items()}
        laid = list(zip(plan.layout.segments, plan.places, strict=True))
        self._trained = [place for segment, places in laid if segment.rule == "slow" for place in places]
        self._means = [place.variable for segment, places in laid if segment.rule == "mean" for place in places]
        self._sharing: dict[int, list[View]] = {}  # by variable: the views that show parts of it, or all
        for place in (place for places in plan.places for place in places):
            self._sharing.setdefault(id(place.variable), []).append(place.view)
        self._gradients: dict[int, Any] = {}
        self._averaged: dict[int, Any] = {}
        # What is not whole yet: stretches of a tensor by where they begin, and parts of a variable by their places.
        # What a trace that was given up has left is overwritten by the next one.
        self._stretches: dict[tuple[str, int], dict[int, Any]] = {}
        self._parts: dict[tuple[str, int], dict[int, tuple[View, Any]]] = {}
        self._counts: Any = None
        with tf.init_scope():
            self._nothing = tf.Variable(0.0, dtype=tf.float64, trainable=False)

    def set_gradients(self, variables: Sequence[Any], gradients: Sequence[Any]) -> None:
        """What `read` gives as "gradient": for each of the variables a tensor or None."""
        self._gradients = {id(v): g for v, g in zip(variables, gradients, strict=True) if g is not None}
        self._averaged = {}

    def gradients(self, variables: Sequence[Any]) -> list[Any]:
        """What has been written as "gradient", for each of the variables."""
        return [self._averaged.get(id(v), tf.zeros(v.shape, v.dtype)) for v in variables]

    def counts(self, variables: Sequence[Any]) -> Any:
        """How many workers have a gradient for each of the variables: float64 (variables,)."""
        # The parts of a variable have a gradient together; one that does not travel has no element.
        at = {id(place.variable): number for number, place in enumerate(self._trained)}
        return tf.stack([self._counts[at[id(v)]] if id(v) in at else tf.zeros([], tf.float64) for v in variables])

    def read(self, vector: str, chunk: Chunk) -> Any:
        if vector in self._vectors:
            begin = chunk.start - self.layout.chunks[chunk.index].start
            return native(self._vectors[vector][chunk.index]).read_value()[begin : begin + chunk.size]
        wire = tf.as_dtype(self.layout.segments[chunk.segment].dtype)
        parts = []
        for place, start, stop, _ in self._spans(chunk):
            v = place.variable
            if vector == "model":
                found = _stretch(native(v).read_value(), place.view, start, stop)
            elif id(v) in self._gradients:
                found = _stretch(self._gradients[id(v)], place.view, start, stop)
            else:
                found = tf.zeros([stop - start], v.dtype)
            parts.append(tf.cast(found, wire))
        return _joined(parts)

    def write(self, vector: str, chunk: Chunk, value: Any) -> None:
        if vector in self._vectors:
            v = self._vectors[vector][chunk.index]
            start = chunk.start - self.layout.chunks[chunk.index].start
            whole = self._whole(vector, id(v), v.shape.num_elements(), start, value)
            if whole is not None:
                native(v).assign(whole)
            return
        for place, start, stop, at in self._spans(chunk):
            v, view = place
            stretch = tf.cast(value[at : at + stop - start], v.dtype)
            flat = self._whole(vector, id(place), view.size, start, stretch)
            whole = None if flat is None else self._variable(vector, place, flat)
            if whole is not None and vector == "gradient":
                self._averaged[id(v)] = whole
            elif whole is not None:
                native(v).assign(whole)

    def _whole(self, vector: str, key: int, size: int, start: int, stretch: Any) -> Any:
        """All elements of a tensor, once the last stretch of it is here; None before."""
        stretches = self._stretches.setdefault((vector, key), {})
        stretches[start] = stretch
        if sum(part.shape[0] for part in stretches.values()) < size:
            return None
        del self._stretches[vector, key]
        return _joined([stretches[at] for at in sorted(stretches)])

    def _variable(self, vector: str, place: Place, flat: Any) -> Any:
        """All of a variable's new value, once the last of its parts is here; None before."""
        v, view = place
        if len(self._sharing[id(v)]) == 1:
            return _turned_back(flat, view)
        parts = self._parts.setdefault((vector, id(v)), {})
        parts[id(place)] = view, _turned_back(flat, view)
        if len(parts) < len(self._sharing[id(v)]):
            return None
        del self._parts[vector, id(v)]
        return _pasted(list(parts.values()), 0)

    def written(self, chunk: Chunk, anchor: Any) -> Any:
        own = tf.as_dtype(self.layout.segments[chunk.segment].entries[0].dtype)
        return anchor if own == anchor.dtype else tf.cast(tf.cast(anchor, own), anchor.dtype)

    def zeros(self, chunk: Chunk) -> Any:
        dtype = self.layout.segments[chunk.segment].dtype
        return tf.fill([chunk.size], tf.cast(self._nothing.read_value(), dtype))  # not a constant, see effects.py

    def present(self) -> Any:
        return [1.0 if id(place.variable) in self._gradients else 0.0 for place in self._trained]

    def admit(self, counts: Any) -> None:
        self._counts = counts

    def finite(self) -> Any:
        watched = {id(place.variable): place.variable for place in self._trained}
        watched |= {id(v): v for v in self._means if v.name in ("moving_mean", "moving_variance")}
        return tf.reduce_all([tf.reduce_all(tf.math.is_finite(native(v).read_value())) for v in watched.values()])

    def reset_base(self) -> None:
        self._inner.reset()

    def _spans(self, chunk: Chunk) -> Iterator[tuple[Place, int, int, int]]:
        places = self._places[chunk.segment]
        for number, start, stop, at in self.layout.spans(chunk):
            yield places[number], start, stop, at


def _stretch(own: Any, view: View, start: int, stop: int) -> Any:
    """Elements start .. stop - 1 of what is on the wire of a variable's value."""
    if view.offset is not None:
        return tf.reshape(own, [-1])[view.offset + start : view.offset + stop]
    return _joined(
        [
            tf.reshape(tf.transpose(tf.reshape(own[p.box], p.shape), p.axes), [-1])[p.start : p.stop]
            for p in view.pieces(start, stop)
        ]
    )


def _turned_back(flat: Any, view: View) -> Any:
    """The part of a variable that a view shows, of the elements on the wire."""
    if view.in_order:
        return tf.reshape(flat, view.extent)
    permuted = [view.shape[axis] for axis in view.axes]
    back = sorted(range(len(view.axes)), key=view.axes.__getitem__)
    return tf.reshape(tf.transpose(tf.reshape(flat, permuted), back), view.extent)


def _pasted(parts: Sequence[tuple[View, Any]], axis: int) -> Any:
    """Parts that fill a box between them, put together: first along the axes behind this one."""
    if len(parts) == 1:
        return parts[0][1]
    rows: dict[int, list[tuple[View, Any]]] = {}
    for view, value in parts:
        rows.setdefault(view.starts[axis], []).append((view, value))
    return tf.concat([_pasted(rows[start], axis + 1) for start in sorted(rows)], axis)


def _joined(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)
