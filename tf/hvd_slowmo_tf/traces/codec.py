"""The codes of few bits in TensorFlow traces; the same bytes and values as the core's, bitwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import tensorflow as tf

from hvd_slowmo.core.parts.codec import LEVELS, blocks_of, payload_bytes
from hvd_slowmo.core.parts.slices import BLOCK
from hvd_slowmo_tf.traces.pieces import joined
from hvd_slowmo_tf.traces.shared import SharedTraces
from hvd_slowmo_tf.traces.tiles import in_tiles

EXACT = {16: tf.bfloat16, 32: tf.float32, 64: tf.float64}
"""Types of TensorFlow's own in which values travel."""
ENCODED = 2**18
"""Elements that are encoded at a time."""


class KerasCodec:
    """`hvd_slowmo.core.parts.codec.Codec` on tensors of TensorFlow.

    Args:
        tiled: encode long vectors in tiles, which XLA can't compile.

    Example:
        >>> codec = KerasCodec()
        >>> message = codec.encode([tf.linspace(-1.0, 1.0, BLOCK)], 1, 8)
        >>> message.shape[0], codec.decode(message, 8).shape[0]
        (1028, 1024)
    """

    tile: int | None = None  # a trace has few operations; `in_tiles` makes loops of them

    def __init__(self, tiled: bool = True) -> None:
        self._tiled = tiled
        self._shared = SharedTraces()

    def encode(self, pieces: Iterable[tf.Tensor], blocks: int, bits: int) -> tf.Tensor:
        g = joined(list(pieces))
        return self._shared.call(("encode", blocks, bits), partial(self._encoded, blocks=blocks, bits=bits), g)

    def decode(self, message: tf.Tensor, bits: int, first: int = 0, last: int | None = None) -> tf.Tensor:
        blocks = blocks_of(message, bits)
        last = blocks if last is None else last
        work = partial(self._decoded, bits=bits, blocks=blocks, first=first, last=last)
        return self._shared.call(("decode", bits, blocks, first, last), work, message)

    def decode_all(self, messages: Sequence[tf.Tensor], bits: int) -> tf.Tensor:
        key = ("decode all", bits, *(message.shape[0] for message in messages))
        return self._shared.call(key, partial(self._decoded_all, bits=bits), *messages)

    def _encoded(self, g: tf.Tensor, blocks: int, bits: int) -> tf.Tensor:
        if bits in EXACT:
            codes = tf.bitcast(tf.cast(g, EXACT[bits]), tf.uint8)
            return tf.reshape(codes, [payload_bytes(blocks * BLOCK, bits)])
        encode = partial(_scales_and_codes, bits=bits)
        scales, codes = in_tiles(encode, [tf.float32, tf.uint8], [g], ENCODED) if self._tiled else encode(g)
        message = tf.concat([tf.reshape(tf.bitcast(scales, tf.uint8), [-1]), codes], 0)
        return tf.reshape(message, [payload_bytes(blocks * BLOCK, bits)])

    def _decoded(self, message: tf.Tensor, bits: int, blocks: int, first: int, last: int) -> tf.Tensor:
        if bits in EXACT:
            size = bits // 8
            return _exact(message[size * first * BLOCK : size * last * BLOCK], bits)
        row = BLOCK * bits // 8
        codes = message[4 * blocks + first * row : 4 * blocks + last * row]
        return _values(message[4 * first : 4 * last], codes, bits)

    def _decoded_all(self, *messages: tf.Tensor, bits: int) -> tf.Tensor:
        if bits in EXACT:
            return _exact(joined(messages), bits)
        pairs = [(message, 4 * blocks_of(message, bits)) for message in messages]
        scales = joined([message[:end] for message, end in pairs])
        codes = joined([message[end:] for message, end in pairs])  # which are shorter than the values
        return _values(scales, codes, bits)

    def padded(self, g: tf.Tensor, elements: int) -> tf.Tensor:
        return g if g.shape[0] == elements else tf.pad(g, [[0, elements - g.shape[0]]])


def _scales_and_codes(g: tf.Tensor, bits: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the scales of the blocks and the bytes of the values."""
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


def _values(scales: tf.Tensor, codes: tf.Tensor, bits: int) -> tf.Tensor:
    """Return the values of blocks, from the bytes of their scales and of their values."""
    scales = tf.bitcast(tf.reshape(scales, [-1, 4]), tf.float32)
    if bits == 4:
        low, high = codes & 15, tf.bitwise.right_shift(codes, tf.constant(4, tf.uint8))
        values = tf.cast(tf.stack([low, high], axis=1), tf.float32) - 8
    else:
        values = tf.cast(tf.bitcast(codes, tf.int8), tf.float32)
    return tf.reshape(tf.reshape(values, [scales.shape[0], BLOCK]) * scales[:, None], [scales.shape[0] * BLOCK])


def _exact(codes: tf.Tensor, bits: int) -> tf.Tensor:
    """Return values that travel as they are, or rounded, from their bytes."""
    size = bits // 8
    values = tf.bitcast(tf.reshape(codes, [codes.shape[0] // size, size]), EXACT[bits])
    return tf.cast(values, tf.float64 if bits == 64 else tf.float32)
