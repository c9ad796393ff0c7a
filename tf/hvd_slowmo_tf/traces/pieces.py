"""Stretches of tensors in traces: cut out as they travel, and turned back.

The operations of a trace are few: Python makes each of them before the first step, and a model has hundreds of
variables.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from hvd_slowmo.wire.views import Piece, View


def stretch_of(value: tf.Tensor, view: View, start: int, stop: int) -> tf.Tensor:
    """Return elements start .. stop - 1, in the order of the wire, of the part of a variable that a view shows."""
    if view.offset is not None:
        flat = value if len(value.shape) == 1 else tf.reshape(value, [-1])
        return part_of(flat, view.offset + start, view.offset + stop)
    return joined([box_of(value, piece)[piece.start : piece.stop] for piece in view.pieces(start, stop)])


def box_of(value: tf.Tensor, piece: Piece) -> tf.Tensor:
    """Return the elements of a piece's box of a variable, flat, in the order of the wire."""
    return tf.reshape(tf.transpose(tf.reshape(value[piece.box], piece.shape), piece.axes), [-1])


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


def turned_back(flat: tf.Tensor, view: View) -> tf.Tensor:
    """Return the part of a variable that a view shows, from its elements in the order of the wire."""
    if view.in_order:
        return flat if len(view.extent) == 1 else tf.reshape(flat, view.extent)
    permuted = [view.shape[axis] for axis in view.axes]
    back = sorted(range(len(view.axes)), key=view.axes.__getitem__)
    return tf.reshape(tf.transpose(tf.reshape(flat, permuted), back), view.extent)
