"""Chains of elementwise operations on long tensors, a tile after the other.

TensorFlow runs an operation at a time, each of which reads its inputs from memory and writes its result there. Of a
tile the results stay in the cache of a core, from one operation to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.outer_update import Momentum, outer_update

TILE = 2**16
"""Elements that are updated at a time. With fewer the costs of an operation show, some microseconds."""


def in_tiles(
    work: Callable[..., Sequence[tf.Tensor]], dtypes: Sequence[tf.DType], tensors: Sequence[tf.Tensor], tile: int
) -> Sequence[tf.Tensor]:
    """Return work(*tensors), computed tile by tile in a trace for a CPU, where it is long. XLA can't compile that.

    Args:
        work: takes flat tensors of one length and returns flat tensors. What it returns for a tile is the part of its
            results that the tile's elements decide, and depends on no others.
        dtypes: of the results, whose length a trace does not know.
        tensors: flat, of one length.
        tile: elements.

    Example:
        >>> doubled = tf.function(lambda x: in_tiles(lambda x: [2 * x], [x.dtype], [x], tile=2)[0])
        >>> doubled(tf.constant([1.0, 2.0, 3.0, 4.0, 5.0])).numpy().tolist()
        [2.0, 4.0, 6.0, 8.0, 10.0]
    """
    length = tensors[0].shape[0]
    if length < 2 * tile or not tf.inside_function() or tf.config.list_logical_devices("GPU"):
        return work(*tensors)
    whole = length // tile

    def step(number: tf.Tensor, results: Sequence[tf.TensorArray]) -> tuple[tf.Tensor, Sequence[tf.TensorArray]]:
        # A slice that begins at a multiple of 64 bytes is no copy.
        parts = work(*[tf.slice(x, [number * tile], [tile]) for x in tensors])
        return number + 1, [array.write(number, part) for array, part in zip(results, parts, strict=True)]

    rest = length % tile
    tiles = whole + (rest > 0)
    arrays = [tf.TensorArray(dtype, tiles, element_shape=[None], infer_shape=False) for dtype in dtypes]
    _, filled = tf.while_loop(lambda number, _: number < whole, step, [tf.constant(0), arrays])
    if rest:
        parts = work(*[x[whole * tile :] for x in tensors])
        filled = [array.write(whole, part) for array, part in zip(filled, parts, strict=True)]
    return [array.concat() for array in filled]


def tiled_outer_update(
    config: SlowMoConfig, mean: tf.Tensor, anchor: tf.Tensor, v: tf.Tensor | None, m: Momentum
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Do as `hvd_slowmo.core.parts.outer_update.outer_update`, in tiles; the same values, bitwise."""
    if v is None:
        (x,) = in_tiles(lambda mean, x: [outer_update(config, mean, x, None, m)[0]], [mean.dtype], [mean, anchor], TILE)
        return tf.ensure_shape(x, mean.shape), None

    def update(mean: tf.Tensor, anchor: tf.Tensor, v: tf.Tensor) -> Sequence[tf.Tensor]:
        return outer_update(config, mean, anchor, v, m)

    x, v = in_tiles(update, [mean.dtype] * 2, [mean, anchor, v], TILE)
    return tf.ensure_shape(x, mean.shape), tf.ensure_shape(v, mean.shape)
