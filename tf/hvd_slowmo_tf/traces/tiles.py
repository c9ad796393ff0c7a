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
    work: Callable[..., Sequence[tf.Tensor]], tensors: Sequence[tf.Tensor], lengths: Sequence[int]
) -> Sequence[tf.Tensor]:
    """Return work(*tensors), computed tile by tile in a trace for a CPU, where it is long. XLA can't compile that.

    Args:
        work: takes flat tensors and returns flat tensors. What it returns for a tile is the part of its results that
            the tile's elements decide, and depends on no others.
        tensors: flat, each as many tiles long as the others. Of the last tile some elements may be missing.
        lengths: elements of a tile of each.

    Example:
        >>> doubled = tf.function(lambda x: in_tiles(lambda x: [2 * x], [x], lengths=[2])[0])
        >>> doubled(tf.constant([1.0, 2.0, 3.0, 4.0, 5.0])).numpy().tolist()
        [2.0, 4.0, 6.0, 8.0, 10.0]
    """
    tiles = max(-(-x.shape[0] // length) for x, length in zip(tensors, lengths, strict=True))
    if tiles < 3 or not tf.inside_function() or tf.config.list_logical_devices("GPU"):
        return work(*tensors)
    sizes: list[int] = []  # of the results for a whole tile

    def step(number: tf.Tensor, results: Sequence[tf.TensorArray]) -> tuple[tf.Tensor, Sequence[tf.TensorArray]]:
        # A slice that begins at a multiple of 64 bytes is no copy.
        parts = work(*[tf.slice(x, [number * length], [length]) for x, length in zip(tensors, lengths, strict=True)])
        sizes[:] = [part.shape[0] for part in parts]
        return number + 1, [array.write(number, part) for array, part in zip(results, parts, strict=True)]

    # The last one, which may be shorter, tells the types as well.
    last = work(*[x[(tiles - 1) * length :] for x, length in zip(tensors, lengths, strict=True)])
    arrays = [tf.TensorArray(part.dtype, tiles, element_shape=[None], infer_shape=False) for part in last]
    _, filled = tf.while_loop(lambda number, _: number < tiles - 1, step, [tf.constant(0), arrays])
    return [
        tf.reshape(array.write(tiles - 1, part).concat(), [(tiles - 1) * size + part.shape[0]])
        for array, size, part in zip(filled, sizes, last, strict=True)
    ]


def tiled_outer_update(
    config: SlowMoConfig, mean: tf.Tensor, anchor: tf.Tensor, v: tf.Tensor | None, m: Momentum
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """Do as `hvd_slowmo.core.parts.outer_update.outer_update`, in tiles; the same values, bitwise."""
    if v is None:
        return outer_update(config, mean, anchor, v, m)  # of three operations at most

    def update(mean: tf.Tensor, anchor: tf.Tensor, v: tf.Tensor) -> Sequence[tf.Tensor]:
        return outer_update(config, mean, anchor, v, m)

    x, v = in_tiles(update, [mean, anchor, v], [TILE] * 3)
    return x, v
