"""Recomputing BatchNorm's moving statistics for the model as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.core.average.metric_mean import agree_on_success
from hvd_slowmo.core.start.arguments import refuse_both
from hvd_slowmo_tf.horovod import workers
from hvd_slowmo_tf.metric_mean import mean


def recompute_statistics(
    model: keras.Model, batches: Iterable[Any], *, process_set: Any = None, comm: Comm | None = None
) -> None:
    """Set BatchNorm's moving statistics to the mean over these batches, of all workers. A collective.

    Moving statistics follow a model over many batches, and one that jumps by its slow momentum leaves them behind, most
    of all under Keras' default momentum of 0.99: the training loss is good and the evaluation's is not. Call this after
    `fit`, before an evaluation or a save that counts. A pass over 50 to 100 batches is enough; see Izmailov et al., UAI
    2018 (arXiv 1803.05407), section 3.2.

    Args:
        model: its BatchNormalization layers are changed, and nothing else.
        batches: this worker's: inputs of the model, or tuples and lists that begin with them. None at all is allowed on
            a worker.
        process_set: as given to `SlowMo`.
        comm: as given to `SlowMo`.

    Raises:
        ValueError: on every rank, if the workers' models have other BatchNormalization layers.
        Exception: on every rank of one type, if the pass fails on one; all layers are as before then.

    Example:
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization()])
        >>> recompute_statistics(model, [np.array([[1.0], [3.0]]), np.array([[3.0], [5.0]])])
        >>> float(model.layers[0].moving_mean[0]), float(model.layers[0].moving_variance[0])
        (3.0, 1.0)
    """
    refuse_both(comm, process_set=process_set)
    layers = [x for x in model._flatten_layers() if isinstance(x, keras.layers.BatchNormalization) and x.trainable]
    momenta = [layer.momentum for layer in layers]
    variables = [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]
    before = [v.numpy() for v in variables]
    seen = 0
    error: Exception | None = None
    try:
        for batch in batches:
            # The moving average of equal weights: the first batch replaces what was there.
            for layer in layers:
                layer.momentum = seen / (seen + 1)
            model(batch[0] if isinstance(batch, (tuple, list)) else batch, training=True)
            seen += 1
    except Exception as caught:  # a worker that fails alone must not leave the others waiting
        error = caught
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    everyone = workers.connect(process_set) if comm is None else comm
    try:
        agree_on_success(everyone, error)
    except Exception:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
        raise
    means = mean({str(number): v.value for number, v in enumerate(variables)}, weight=seen, comm=everyone)
    for number, variable in enumerate(variables):
        if np.all(np.isfinite(means[str(number)])):  # not where nobody had a batch
            variable.assign(means[str(number)])
