"""One step's gradients in a trace, as the core averages them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import keras
import tensorflow as tf

from hvd_slowmo.core.parts.layout import Chunk
from hvd_slowmo.wire.views import View
from hvd_slowmo_tf.model.layout import KerasLayout, spans
from hvd_slowmo_tf.traces.pieces import joined, parted, stretch_of, turned_back


class VariableGradients:
    """`hvd_slowmo.core.parts.store.GradientSource` of one trace.

    Args:
        layout: of the model.
        variables: trained by the optimizer.
        gradients: a dense tensor for each variable, or None.
    """

    def __init__(
        self, layout: KerasLayout, variables: Sequence[keras.Variable], gradients: Sequence[tf.Tensor | None]
    ) -> None:
        self._layout = layout
        self._variables = variables
        self._gradients = {id(v): g for v, g in zip(variables, gradients, strict=True) if g is not None}
        self._refs = layout.refs_of("parameter")
        self._stretches: dict[int, list[tuple[int, tf.Tensor]]] = {}  # of the means: by tensor, with their starts
        self._counts: tf.Tensor = None

    def read(self, chunk: Chunk) -> tf.Tensor:
        parts = []
        for ref, start, stop, _ in spans(self._layout, chunk):
            own = self._gradients.get(id(ref.variable))
            if own is None:
                parts.append(tf.zeros([stop - start], self._wire(chunk)))
            else:
                parts.append(tf.cast(stretch_of(own, ref.spec.view, start, stop), self._wire(chunk)))
        return joined(parts)

    def write(self, chunk: Chunk, mean: tf.Tensor) -> None:
        found = list(spans(self._layout, chunk))
        parts = parted(mean, [stop - start for _, start, stop, _ in found])
        for (ref, start, _, _), part in zip(found, parts, strict=True):
            self._stretches.setdefault(id(ref), []).append((start, tf.cast(part, ref.variable.dtype)))

    def present(self) -> tf.Tensor:
        return tf.constant([float(id(ref.variable) in self._gradients) for ref in self._refs], tf.float64)

    def misfit(self) -> int:
        return 0  # Keras' variables keep their form

    def entered(self) -> int:
        return 0  # looked for when a training begins

    def admit(self, counts: tf.Tensor) -> None:
        self._counts = counts

    def means(self) -> list[tf.Tensor]:
        """Return the mean gradient of each variable: dense, zeros where no worker has one."""
        parts: dict[int, list[tuple[View, tf.Tensor]]] = {}  # of each variable
        for ref in self._refs:
            stretches = sorted(self._stretches.get(id(ref), []), key=itemgetter(0))
            if stretches:
                value = turned_back(joined([stretch for _, stretch in stretches]), ref.spec.view)
                parts.setdefault(id(ref.variable), []).append((ref.spec.view, value))
        return [_pasted(parts[id(v)], 0) if id(v) in parts else tf.zeros(v.shape, v.dtype) for v in self._variables]

    def counts(self) -> tf.Tensor:
        """Return the number of workers that have a gradient for each variable: float64 (variables,)."""
        # The parts of a variable have a gradient together. A variable without elements does not travel.
        at = {id(ref.variable): number for number, ref in enumerate(self._refs)}
        none = tf.zeros([], tf.float64)
        return tf.stack([self._counts[at[id(v)]] if id(v) in at else none for v in self._variables])

    def _wire(self, chunk: Chunk) -> str:
        return self._layout.layout.segments[chunk.segment].dtype


def _pasted(parts: Sequence[tuple[View, tf.Tensor]], axis: int) -> tf.Tensor:
    """Return the box that the parts fill between them; they are put together along the later axes first."""
    if len(parts) == 1:
        return parts[0][1]
    rows: dict[int, list[tuple[View, tf.Tensor]]] = {}
    for view, value in parts:
        rows.setdefault(view.starts[axis], []).append((view, value))
    return tf.concat([_pasted(rows[start], axis + 1) for start in sorted(rows)], axis)
