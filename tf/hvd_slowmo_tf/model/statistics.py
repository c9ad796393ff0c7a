"""Variables of a model that are not trained, and whether they are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf

from hvd_slowmo.core.start.choice import Names, check_patterns, is_averaged
from hvd_slowmo_tf.model.layout import common_path

_SPECTRAL = "vector_u"
"""Name of the variable of keras.layers.SpectralNormalization."""


def chosen_statistics(
    variables: Sequence[keras.Variable],
    statistics: Sequence[keras.Variable],
    trained: Sequence[keras.Variable],
    choice: Mapping[str, bool],
) -> list[keras.Variable]:
    """Return the variables that are averaged without being trained.

    Args:
        variables: all of the optimizer's part of the model.
        statistics: those among them that are averaged by themselves, where they have a mean. Not the vector of spectral
            normalization, where it was in this worker's kernel: vectors of opposite signs would have a mean of nothing,
            by which the next step divides the kernel.
        trained: by the optimizer.
        choice: as in `is_averaged`, of paths as they are or without the numbers that Keras appends.

    Raises:
        TypeError: one that is to be averaged has no mean.
        ValueError: a pattern by which nothing would be averaged.

    Example:
        >>> teacher, queue = (keras.Variable([0.0], trainable=False, name=name) for name in ("teacher", "queue"))
        >>> [v.name for v in chosen_statistics([teacher, queue], [queue], [], {"teacher": True, "queue": False})]
        ['teacher']
    """
    usual, own = {id(v) for v in statistics}, {id(v) for v in trained}
    others = [v for v in variables if id(v) not in usual]
    untrained = [v for v in (*statistics, *others) if id(v) not in own]
    check_patterns([_names(v) for v in untrained], choice)

    def averaged(v: keras.Variable) -> bool:
        dtype = tf.as_dtype(v.dtype)
        usually = id(v) in usual and dtype.is_floating and v.name != _SPECTRAL
        return is_averaged(_names(v), choice, usual=usually, dtype=dtype.name, has_mean=dtype.is_floating)

    return [v for v in untrained if averaged(v)]


def _names(v: keras.Variable) -> Names:
    """Return a variable's path without the numbers that Keras appends, and as it is: a user may have set a number."""
    return common_path(v.path), v.path
