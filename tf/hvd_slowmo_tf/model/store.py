"""The core's vectors on Keras: variables, gathered into flat chunks and scattered back, in traces."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import keras
import tensorflow as tf

from hvd_slowmo.core.parts.layout import Chunk, Stretch
from hvd_slowmo.core.parts.progress import Vector
from hvd_slowmo.core.parts.store import Condition
from hvd_slowmo.wire.views import View
from hvd_slowmo_tf.inner_optimizer import InnerOptimizer
from hvd_slowmo_tf.model.layout import KerasLayout, native, spans
from hvd_slowmo_tf.traces.in_place import assign, assign_in_place, owned
from hvd_slowmo_tf.traces.pieces import joined, part_of, parted, stretch_of


class VariableStore:
    """`hvd_slowmo.core.parts.store.Store` on Keras variables.

    Args:
        layout: of the model.
        vectors: per name, a flat variable for each chunk of parameters, by its number.
        inner: whose state is reset.
        slices: per name of a vector that is kept in slices, a variable by chunk.
    """

    def __init__(
        self,
        layout: KerasLayout,
        vectors: Mapping[str, Mapping[int, keras.Variable]],
        inner: InnerOptimizer,
        slices: Mapping[str, Mapping[int, keras.Variable]] = MappingProxyType({}),
    ) -> None:
        self._layout = layout
        self._inner = inner
        self._vectors = {name: dict(variables) for name, variables in vectors.items()}
        self._slices = slices
        statistics = [ref.variable for ref in layout.refs_of("statistic")]
        watched = [ref.variable for ref in layout.refs_of("parameter")]
        watched += [v for v in statistics if v.name in ("moving_mean", "moving_variance")]
        self._watched = {id(v): v for v in watched}
        self._inner_state = {id(ref.variable): ref.variable for ref in layout.refs_of("optimizer_state")}  # averaged
        with tf.init_scope():
            self._zero = tf.Variable(0.0, dtype=tf.float64, trainable=False)
            if "in_flight" in self._vectors:
                # Parameters alone are the optimizer's variables, which it can make before the model is known.
                self._vectors["in_flight"] |= {
                    chunk.index: tf.Variable(self.read("model", chunk), trainable=False)
                    for chunk in layout.layout.chunks
                    if chunk.role != "parameter"
                }

    def resend_statistics(self) -> None:
        """Let the values in flight of all but parameters be the present ones: no state holds them."""
        for chunk in self._layout.layout.chunks:
            if chunk.role != "parameter" and "in_flight" in self._vectors:
                native(self._vectors["in_flight"][chunk.index]).assign(self.read("model", chunk))

    def read(self, vector: str, stretch: Stretch) -> tf.Tensor:
        if vector != "model":
            begin = self._begin(stretch)
            return part_of(native(self._vectors[vector][stretch.index]).value(), begin, begin + stretch.size)
        wire = self._layout.layout.segments[stretch.segment].dtype
        found = list(spans(self._layout, stretch))
        values = joined(
            [
                tf.cast(stretch_of(native(ref.variable).value(), ref.spec.view, start, stop), wire)
                for ref, start, stop, _ in found
            ]
        )
        # A part of a variable's memory that waits for its turn would make a write to the variable move all of it. Where
        # exchanges are late, what is read is used up before the next write.
        shares = len(found) == 1 and found[0][0].variable.dtype == wire
        return owned(values) if shares and "in_flight" not in self._vectors else values

    def write(self, vector: str, stretch: Stretch, value: tf.Tensor) -> None:
        if vector != "model":
            v = native(self._vectors[vector][stretch.index])
            begin = self._begin(stretch)
            assign(v, View.same(v.shape), begin, begin + stretch.size, value)
            return
        found = list(spans(self._layout, stretch))
        parts = parted(value, [stop - start for _, start, stop, _ in found])
        for (ref, start, stop, _), part in zip(found, parts, strict=True):
            assign(native(ref.variable), ref.spec.view, start, stop, tf.cast(part, ref.variable.dtype))

    def read_slice(self, vector: str, chunk: int) -> tf.Tensor:
        return native(self._slices[vector][chunk]).value()

    def write_slice(self, vector: str, chunk: int, value: tf.Tensor) -> None:
        native(self._slices[vector][chunk]).assign(value)

    def as_stored(self, stretch: Stretch, anchor: tf.Tensor) -> tf.Tensor:
        own = tf.as_dtype(self._layout.layout.segments[stretch.segment].tensors[0].dtype)
        return anchor if own == anchor.dtype else tf.cast(tf.cast(anchor, own), anchor.dtype)

    def zeros(self, stretch: Stretch) -> tf.Tensor:
        dtype = self._layout.layout.segments[stretch.segment].dtype
        return tf.fill([stretch.size], tf.cast(self._zero.read_value(), dtype))  # not a constant, see graph_comm.py

    def set_aside(self, chunk: Chunk, zeros: bool = False) -> None:
        # In place: an assigned tensor may be part of the model's memory, all of which the next step would have to move.
        v = native(self._vectors["in_flight"][chunk.index])
        assign_in_place(v, View.same(v.shape), 0, chunk.size, self.read("model", chunk))

    def drop(self, chunk: Chunk) -> None:
        """Do nothing: a trace can't free a variable."""

    def finite(self, vector: str, fragment: int | None) -> tf.Tensor:
        if vector != "model" or (fragment is not None and self._layout.layout.fragments > 1):
            return self._stretches_finite(vector, fragment)
        checked = [*self._watched.values(), *(() if fragment is None else self._inner_state.values())]
        ranks = {len(v.shape) for v in checked}
        axes = {rank: tf.constant(list(range(rank)), tf.int32, [rank]) for rank in ranks}  # not one per variable
        found = [tf.raw_ops.All(input=tf.math.is_finite(native(v).value()), axis=axes[len(v.shape)]) for v in checked]
        return tf.reduce_all(found)

    def _stretches_finite(self, vector: str, fragment: int | None) -> tf.Tensor:
        found = []
        for chunk in self._layout.layout.chunks:
            if fragment not in (None, chunk.fragment):
                continue
            values = tf.math.is_finite(self.read(vector, chunk))
            for ref, start, stop, at in spans(self._layout, chunk):
                if id(ref.variable) in self._watched or id(ref.variable) in self._inner_state:
                    found.append(tf.reduce_all(values[at : at + stop - start]))
        return tf.reduce_all(found) if found else tf.constant(True)

    def condition(self, fragment: int | None) -> Condition:
        # Keras' variables keep their form, frozen ones are not the optimizer's, and values from outside are looked for
        # when a training begins.
        return Condition(0, 0, tf.ones([len(self._layout.refs_of("parameter"))], tf.float64))

    def mark_block(self, fragment: int | None) -> None:
        """Do nothing: `condition` needs no notes."""

    def unmark_block(self, fragment: int) -> None:
        """Do nothing: `condition` needs no notes."""

    def sent_condition(self, fragment: int) -> Condition:
        return self.condition(fragment)

    def hold(self, moved: Vector) -> None:
        """Do nothing: a worker of Keras moves all."""

    def settle(self, fragment: int | None = None, equal: bool = False) -> None:
        """Do nothing: `condition` needs no notes."""

    def reset_inner_state(self) -> None:
        self._inner.reset()

    def _begin(self, stretch: Stretch) -> int:
        """Return the place of a stretch in its chunk."""
        return stretch.start - self._layout.layout.chunks[stretch.index].start
