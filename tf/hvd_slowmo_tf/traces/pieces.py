"""Stretches of variables in traces: cut out as they travel, and put together until a variable can be assigned whole.

The operations of a trace are few: Python makes each of them before the first step, and a model has hundreds of
variables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import tensorflow as tf

from hvd_slowmo.wire.views import View
from hvd_slowmo_tf.model.layout import VariableRef

K = TypeVar("K")
V = TypeVar("V")


def stretch_of(value: tf.Tensor, view: View, start: int, stop: int) -> tf.Tensor:
    """Return elements start .. stop - 1, in the order of the wire, of the part of a variable that a view shows."""
    if view.offset is not None:
        flat = value if len(value.shape) == 1 else tf.reshape(value, [-1])
        return part_of(flat, view.offset + start, view.offset + stop)
    return joined(
        [
            tf.reshape(tf.transpose(tf.reshape(value[p.box], p.shape), p.axes), [-1])[p.start : p.stop]
            for p in view.pieces(start, stop)
        ]
    )


def part_of(flat: tf.Tensor, start: int, stop: int) -> tf.Tensor:
    """Return elements start .. stop - 1 of a flat tensor, without an operation where these are all."""
    return flat if stop - start == flat.shape[0] else flat[start:stop]


def parted(flat: tf.Tensor, sizes: Sequence[int]) -> list[tf.Tensor]:
    """Return the parts of these sizes that a flat tensor consists of, by one operation."""
    parts: list[tf.Tensor] = [flat] if len(sizes) == 1 else tf.split(flat, sizes)
    return parts


def joined(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    """Return flat tensors end to end."""
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)


class Pending:
    """Half-written variables, which wait until all of their new values are there.

    No variable is ever assigned in part: from then on TensorFlow would copy the whole of it whenever it is read, by the
    model's layers too. So a written stretch changes nothing by itself. Two invariants make that safe:

    - Until its last stretch is written a variable has its old value, and nothing reads a tensor that it has begun to
      write.
    - All stretches of a variable are written in one graph: one trace, and one branch of it. Those that a trace has left
      when it was given up are of another graph, and are dropped. Outside of a trace all are of one graph: `forget`.

    Args:
        refs: all tensors that are written, by which the parts of each variable are known.
    """

    def __init__(self, refs: Iterable[VariableRef]) -> None:
        self._stretches: dict[tuple[str, int], tuple[tf.Graph, dict[int, tf.Tensor]]] = {}  # by the place of each
        self._parts: dict[int, tuple[tf.Graph, dict[int, tuple[View, tf.Tensor]]]] = {}  # by the tensor of each
        self._refs = list(refs)
        self._parts_in_all = Counter(id(ref.variable) for ref in self._refs)

    def begun(self) -> Iterator[tuple[VariableRef, int, int]]:
        """Yield the stretches that are missing of variables begun in this graph: (ref, from, to in the tensor).

        Where all of them are added, their present values say, every variable is complete.
        """
        graph = tf.compat.v1.get_default_graph()
        flats = {key: stretches for (_, key), (its, stretches) in self._stretches.items() if its is graph}
        touched = {id(ref.variable) for ref in self._refs if id(ref) in flats}
        touched |= {key for key, (its, _) in self._parts.items() if its is graph}
        for ref in self._refs:
            if id(ref.variable) not in touched:
                continue
            complete = self._parts.get(id(ref.variable), (None, {}))
            if complete[0] is graph and id(ref) in complete[1]:
                continue
            at = 0
            for start, stretch in sorted(flats.get(id(ref), {}).items()):
                if at < start:
                    yield ref, at, start
                at = start + stretch.shape[0]
            if at < ref.spec.view.size:
                yield ref, at, ref.spec.view.size

    def forget(self) -> None:
        """Drop all stretches of variables that are not complete."""
        self._stretches.clear()
        self._parts.clear()

    def variable(self, ref: VariableRef, start: int, stretch: tf.Tensor) -> tf.Tensor | None:
        """Add a stretch of a tensor; return its variable's new value once it is complete, None before."""
        view, key = ref.spec.view, id(ref.variable)
        flat = self.flat("", id(ref), view.size, start, stretch)
        if flat is None:
            return None
        value = _turned_back(flat, view)
        if self._parts_in_all[key] == 1:
            return value
        parts = _of_this_graph(self._parts, key)
        parts[id(ref)] = view, value
        if len(parts) < self._parts_in_all[key]:
            return None
        del self._parts[key]
        return _pasted(list(parts.values()), 0)

    def flat(self, vector: str, key: int, size: int, start: int, stretch: tf.Tensor) -> tf.Tensor | None:
        """Add a stretch of a flat vector of this size; return all of it once it is complete, None before."""
        stretches = _of_this_graph(self._stretches, (vector, key))
        stretches[start] = stretch
        if sum(part.shape[0] for part in stretches.values()) < size:
            return None
        del self._stretches[vector, key]
        return joined([stretches[at] for at in sorted(stretches)])


def _of_this_graph(pending: dict[K, tuple[tf.Graph, dict[int, V]]], key: K) -> dict[int, V]:
    graph = tf.compat.v1.get_default_graph()
    if key not in pending or pending[key][0] is not graph:
        pending[key] = graph, {}
    return pending[key][1]


def _turned_back(flat: tf.Tensor, view: View) -> tf.Tensor:
    """Return the part of a variable that a view shows, from its elements in the order of the wire."""
    if view.in_order:
        return flat if len(view.extent) == 1 else tf.reshape(flat, view.extent)
    permuted = [view.shape[axis] for axis in view.axes]
    back = sorted(range(len(view.axes)), key=view.axes.__getitem__)
    return tf.reshape(tf.transpose(tf.reshape(flat, permuted), back), view.extent)


def _pasted(parts: Sequence[tuple[View, tf.Tensor]], axis: int) -> tf.Tensor:
    """Return the box that the parts fill between them; they are put together along the later axes first."""
    if len(parts) == 1:
        return parts[0][1]
    rows: dict[int, list[tuple[View, tf.Tensor]]] = {}
    for view, value in parts:
        rows.setdefault(view.starts[axis], []).append((view, value))
    return tf.concat([_pasted(rows[start], axis + 1) for start in sorted(rows)], axis)
