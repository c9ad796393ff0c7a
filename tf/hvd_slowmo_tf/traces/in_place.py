"""Variables that are written in place, all of them or a part.

TensorFlow has operations that write some elements of a variable and leave the others alone. After one of them it copies
the whole variable whenever that is read, by the layers of a model too, so that no reader sees elements change under
it. Here none can: a trace orders reads and writes of a variable, and where a tensor still has the memory of a variable
that is written, the variable moves to new memory first. So the copies are switched off again.
"""

from __future__ import annotations

import math

import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from hvd_slowmo.wire.views import Piece, View
from hvd_slowmo_tf.traces.pieces import box_of, turned_back

LARGE = 2**16
"""Elements of a matrix from which all of it is written in place as well."""
ROW = 16
"""Elements of a row from which rows are copied as such. Shorter ones take longer than their elements one by one."""


def compiled() -> bool:
    """Return whether XLA compiles what is being traced."""
    return bool(tf.inside_function() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def owned(tensor: tf.Tensor) -> tf.Tensor:
    """Return a long tensor with memory of its own, and not a variable's that it was read from."""
    return tensor if tensor.shape[0] < LARGE or compiled() else tf.raw_ops.DeepCopy(x=tensor)


def assign(variable: tf.Variable, view: View, start: int, stop: int, value: tf.Tensor) -> None:
    """Set elements start .. stop - 1, in the order of the wire, of what a view shows of a variable.

    Args:
        variable: of the view's own shape.
        value: (stop - start,), of the variable's type. The variable may take over its memory.

    Example:
        >>> x = tf.Variable(tf.zeros([2, 3]))
        >>> assign(x, View.same((2, 3)), 1, 4, tf.constant([7.0, 8.0, 9.0]))
        >>> x.numpy().tolist()
        [[0.0, 7.0, 8.0], [9.0, 0.0, 0.0]]
    """
    shape = tuple(variable.shape)
    if stop - start == math.prod(shape) and (len(shape) < 2 or stop - start < LARGE):
        variable.assign(turned_back(value, view))
    else:
        assign_in_place(variable, view, start, stop, value)


def assign_in_place(variable: tf.Variable, view: View, start: int, stop: int, value: tf.Tensor) -> None:
    """Do as `assign`, and never take over the memory of `value`.

    Where that is a part of another variable's, TensorFlow would have to move the other variable when it changes.
    """
    at = 0
    for piece in view.pieces(start, stop):
        part = value if piece.size == value.shape[0] else value[at : at + piece.size]
        _assign_box(variable, piece, _of_box(variable, piece, part))
        at += piece.size
    if not compiled():  # XLA copies no variable, and knows no such operation
        tf.raw_ops.DisableCopyOnRead(resource=variable.handle)


def _of_box(variable: tf.Variable, piece: Piece, part: tf.Tensor) -> tf.Tensor:
    """Return the new values of a piece's box, from those of the stretch."""
    in_order = list(piece.axes) == sorted(piece.axes)
    if not piece.whole:
        box = box_of(variable.value(), piece)
        part = tf.concat([box[: piece.start], part, box[piece.stop :]], 0)
    if not in_order:
        part = tf.transpose(tf.reshape(part, piece.permuted), piece.back)
    return tf.reshape(part, piece.extent)


def _assign_box(variable: tf.Variable, piece: Piece, values: tf.Tensor) -> None:
    begin = [part.start for part in piece.box]
    whole_rows = values.shape[1:] == variable.shape[1:] and math.prod(variable.shape[1:]) >= ROW
    if whole_rows and len(begin) > 1:
        rows = tf.range(begin[0], begin[0] + values.shape[0])
        tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=rows, updates=values)
        return
    end = [at + length for at, length in zip(begin, values.shape, strict=True)]
    tf.raw_ops.ResourceStridedSliceAssign(
        ref=variable.handle,
        begin=tf.constant(begin, tf.int32, [len(begin)]),
        end=tf.constant(end, tf.int32, [len(end)]),
        strides=tf.ones([len(begin)], tf.int32),
        value=values,
    )
