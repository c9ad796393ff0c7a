"""The workers' mean of losses and metrics."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.core.average.metric_mean import mean_of
from hvd_slowmo.core.start.arguments import refuse_both
from hvd_slowmo_tf.horovod import workers


def mean(value: Any, weight: float = 1.0, *, process_set: Any = None, comm: Comm | None = None) -> Any:
    """Return the weighted mean of a loss or metric over the workers, in a custom training loop. A collective.

    Use it at the end of an epoch, outside of a tf.function. In every step it would make the workers wait for each
    other, which SlowMo avoids. Under `fit`, SlowMoCallback averages the metrics.

    Args:
        value: a number, a tensor or variable, or a dict of them; small, because every worker receives all workers'
            values. A tensor keeps its shape and type; the mean of integers has Keras' default type.
        weight: of this worker, such as its number of samples. Workers of weight 0 take no part, whatever their values
            are; if all weights are 0 the mean is NaN.
        process_set: the Horovod process set whose workers are meant; None for all ranks.
        comm: the workers, in place of Horovod's.

    Returns:
        The mean in the form of `value`; a tensor for a variable.

    Raises:
        TypeError, ValueError: on every rank, if one's value or weight is no number, or names or shapes differ.
        ValueError: called in a tf.function.

    Example:
        >>> mean({"loss": 0.5, "accuracy": tf.constant(0.75)}, weight=64)["loss"]
        0.5
    """
    if tf.inside_function():
        raise ValueError("mean() is for the end of an epoch: call it outside of the tf.function.")
    refuse_both(comm, process_set=process_set)
    return mean_of(workers.connect(process_set) if comm is None else comm, value, weight, _to_numpy, _like)


def _to_numpy(value: Any) -> Any:
    return value.numpy() if _is_tensor(value) else value


def _like(value: Any, mean: NDArray[np.float64]) -> Any:
    if _is_tensor(value):
        dtype = tf.as_dtype(value.dtype)
        return tf.constant(mean, dtype if dtype.is_floating else keras.config.floatx())
    return mean if mean.shape else float(mean)


def _is_tensor(value: Any) -> bool:
    return tf.is_tensor(value) or isinstance(value, keras.Variable)
