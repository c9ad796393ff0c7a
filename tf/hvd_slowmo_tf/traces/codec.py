"""The codes of few bits in TensorFlow traces; the same bytes and values as the core's, bitwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import tensorflow as tf

from hvd_slowmo.core.parts.codec import LEVELS, Coded, Elementwise, blocks_of, payload_bytes
from hvd_slowmo.core.parts.layout import BLOCK
from hvd_slowmo_tf.traces.pieces import joined
from hvd_slowmo_tf.traces.shared import SharedTraces
from hvd_slowmo_tf.traces.tiles import in_tiles

EXACT = {16: tf.bfloat16, 32: tf.float32, 64: tf.float64}
"""Types of TensorFlow's own in which values travel."""
TILE = 256
"""Blocks that are worked on at a time."""


class KerasCodec:
    """`hvd_slowmo.core.parts.codec.Codec` on tensors of TensorFlow.

    Args:
        tiled: work on long vectors in tiles, which XLA can't compile.

    Example:
        >>> from hvd_slowmo.core.parts.codec import plain
        >>> codec = KerasCodec()
        >>> message = codec.encode(plain(tf.linspace(-1.0, 1.0, BLOCK)), 0, 1, 8)
        >>> message.shape[0], codec.decode(codec.cut(message, 8), 8).shape[0]
        (1028, 1024)
    """

    tile: int | None = None  # a trace has few operations; `in_tiles` makes loops of them

    def __init__(self, tiled: bool = True) -> None:
        self._tiled = tiled
        self._shared = SharedTraces()

    def compute(self, vector: Elementwise, first: int, last: int) -> tf.Tensor:
        (values,) = self._worked_on("compute", vector, (first, last), lambda piece: [piece])
        return values

    def encode(self, vector: Elementwise, first: int, last: int, bits: int) -> tf.Tensor:
        code = partial(_coded, bits=bits)
        join = partial(_message, blocks=last - first, bits=bits)
        (message,) = self._worked_on(f"encode {bits}", vector, (first, last), code, join, tiled=bits < 32)
        return message

    def encode_with_rest(self, vector: Elementwise, first: int, last: int, bits: int) -> tuple[tf.Tensor, tf.Tensor]:
        def code(piece: tf.Tensor) -> Sequence[tf.Tensor]:
            whole = _whole_blocks(piece)
            coded = _coded(whole, bits)
            return [whole - self.decode(coded, bits), *coded]

        def join(found: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
            rest, *coded = found
            return [*_message(coded, last - first, bits), rest]

        message, rest = self._worked_on(f"encode {bits} with rest", vector, (first, last), code, join)
        return message, rest

    def _worked_on(
        self,
        kind: str,
        vector: Elementwise,
        span: tuple[int, int],
        finish: Callable[[tf.Tensor], Sequence[tf.Tensor]],
        join: Callable[[Sequence[tf.Tensor]], Sequence[tf.Tensor]] = list,
        tiled: bool = True,
    ) -> Sequence[tf.Tensor]:
        """Return what `join` makes of what `finish` makes of some blocks of a vector.

        Args:
            kind: names `finish` and `join`.
            span: the first block, and the one behind the last.
            tiled: it is worth the copy that tiles cost.
        """
        given = [source(*span) for source in vector.sources]
        tensors = tf.nest.flatten(given)
        # Values may end within a block, codes do not.
        is_code = [isinstance(each, tuple) for each in given for _ in tf.nest.flatten(each)]
        blocks = span[1] - span[0]
        lengths = [TILE * (x.shape[0] // max(1, blocks) if c else BLOCK) for x, c in zip(tensors, is_code, strict=True)]
        traced = [scalar for scalar in vector.scalars if tf.is_tensor(scalar)]
        known = tuple(None if tf.is_tensor(scalar) else scalar for scalar in vector.scalars)

        def work(*arguments: tf.Tensor) -> Sequence[tf.Tensor]:
            left = iter(arguments[: len(traced)])
            scalars = [next(left) if scalar is None else scalar for scalar in known]

            def of_piece(*parts: tf.Tensor) -> Sequence[tf.Tensor]:
                return finish(vector.function(*scalars, *tf.nest.pack_sequence_as(given, parts)))

            flat = arguments[len(traced) :]
            return join(in_tiles(of_piece, flat, lengths) if self._tiled and tiled and blocks else of_piece(*flat))

        key = kind, vector.function, known, *((x.shape[0], x.dtype) for x in tensors)
        return self._shared.call(key, work, *traced, *tensors)

    def cut(self, message: tf.Tensor, bits: int, first: int = 0, last: int | None = None) -> Coded:
        last = blocks_of(message, bits) if last is None else last
        key = "cut", bits, first, last, message.shape[0]
        return self._shared.call(key, partial(_cut, bits=bits, first=first, last=last), message)

    def cut_all(self, messages: Sequence[tf.Tensor], bits: int) -> Coded:
        def cut(*of: tf.Tensor) -> Coded:
            cuts = [_cut(message, bits, 0, blocks_of(message, bits)) for message in of]
            return tuple(joined(each) for each in zip(*cuts, strict=True))

        return self._shared.call(("cut all", bits, *(message.shape[0] for message in messages)), cut, *messages)

    def decode(self, coded: Coded, bits: int) -> tf.Tensor:
        codes = coded[-1]
        if bits in EXACT:
            size = bits // 8
            values = tf.bitcast(tf.reshape(codes, [codes.shape[0] // size, size]), EXACT[bits])
            return tf.cast(values, tf.float64 if bits == 64 else tf.float32)
        if bits == 4:
            low, high = codes & 15, tf.bitwise.right_shift(codes, tf.constant(4, tf.uint8))
            values = tf.cast(tf.stack([low, high], axis=1), tf.float32) - 8
        else:
            values = tf.cast(tf.bitcast(codes, tf.int8), tf.float32)
        scales = coded[0]
        return tf.reshape(tf.reshape(values, [scales.shape[0], BLOCK]) * scales[:, None], [scales.shape[0] * BLOCK])

    def padded(self, g: tf.Tensor, elements: int) -> tf.Tensor:
        return _padded(g, elements)


def _padded(g: tf.Tensor, elements: int) -> tf.Tensor:
    return g if g.shape[0] == elements else tf.pad(g, [[0, elements - g.shape[0]]])


def _whole_blocks(g: tf.Tensor) -> tf.Tensor:
    """Return values filled up with zeros to whole blocks."""
    return _padded(g, -(-g.shape[0] // BLOCK) * BLOCK)


def _coded(g: tf.Tensor, bits: int) -> Coded:
    """Return the scales of values, if these have any, and their bytes."""
    g = _whole_blocks(g)
    if bits in EXACT:
        return (tf.reshape(tf.bitcast(tf.cast(g, EXACT[bits]), tf.uint8), [g.shape[0] * bits // 8]),)
    rows = tf.reshape(g, [-1, BLOCK])
    # The greatest magnitude, without the rows' absolute values as a tensor of their own.
    greatest = tf.maximum(tf.reduce_max(rows, axis=1), -tf.reduce_min(rows, axis=1))
    # TensorFlow would turn a plain division by a constant into a product with its reciprocal: another last bit.
    scales = tf.math.divide_no_nan(greatest, float(LEVELS[bits]))
    scales = tf.where(tf.equal(scales, 0), tf.ones_like(scales), scales)
    values = tf.cast(tf.round(rows / scales[:, None]), tf.int8)
    if bits == 8:
        return scales, tf.reshape(tf.bitcast(values, tf.uint8), [-1])
    unsigned = tf.reshape(tf.bitcast(values + 8, tf.uint8), [-1, 2])
    return scales, unsigned[:, 0] | tf.bitwise.left_shift(unsigned[:, 1], tf.constant(4, tf.uint8))


def _message(coded: Sequence[tf.Tensor], blocks: int, bits: int) -> list[tf.Tensor]:
    """Return scales and bytes as one message of so many blocks."""
    *scales, codes = coded
    message = joined([*(tf.reshape(tf.bitcast(each, tf.uint8), [-1]) for each in scales), codes])
    return [tf.reshape(message, [payload_bytes(blocks * BLOCK, bits)])]


def _cut(message: tf.Tensor, bits: int, first: int, last: int) -> Coded:
    """Return blocks first .. last - 1 of a message."""
    blocks = blocks_of(message, bits)
    row = BLOCK * bits // 8
    if bits in EXACT:
        return (message[row * first : row * last],)
    scales = tf.bitcast(tf.reshape(message[4 * first : 4 * last], [last - first, 4]), tf.float32)
    return scales, message[4 * blocks + row * first : 4 * blocks + row * last]
