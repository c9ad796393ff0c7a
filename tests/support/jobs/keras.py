"""Jobs for Horovod workers (see ../pool.py): starts, misuse, half precision, process sets."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf

from hvd_slowmo.core.start import bulk
from hvd_slowmo.tf import SlowMo, SlowMoCallback, SlowMoConfig, mean
from support.models.keras import batch, fit, held, net

SGD = keras.optimizers.SGD


def averaged_loss() -> tuple[float, list[float]]:
    """Average a number and a tensor."""
    rank = hvd.rank()
    return mean(float(rank), weight=1 + 2 * rank), mean(tf.constant([rank, 1.0])).numpy().tolist()


def misuse(kind: str) -> str:
    """Do one thing wrong on rank 1; return each rank's error."""
    odd = hvd.rank() == 1
    v = keras.Variable(np.ones(3 if kind == "shape" and odd else 2, "float32"), name="v")
    config = SlowMoConfig(tau=3 if kind == "tau" and odd else 2)
    optimizer = SlowMo(SGD(0.1), config)
    given: Any = [v]
    try:
        if kind == "argument" and odd:
            given = [tf.Variable([1.0, 1.0])]
        if kind == "steps":
            optimizer.broadcast(given)
            again = SlowMo(SGD(0.1), config)
            again.build(given)
            again.worker.variables.scalars["step"].assign(2 if odd else 5)
            optimizer = again
        optimizer.broadcast(given)
        if kind == "parameter":
            optimizer.apply([tf.ones(2)], given)
            optimizer.apply([tf.fill([2], np.float32("nan" if odd else 1.0))], given)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def starts(kind: str) -> list[Any]:
    """Return parameters, momentum and steps; kind: "fresh", "rank 0 has a checkpoint" or "all have their own"."""
    model = net(hvd.rank())
    optimizer = SlowMo(SGD(0.1, momentum=0.5), SlowMoConfig(tau=3))
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    if kind == "all" or (kind == "rank 0" and hvd.rank() == 0):
        for v in optimizer.inner_optimizer.variables:
            if v.name.endswith("momentum"):
                v.assign(v.value + 1 + hvd.rank())
        optimizer.worker.variables.scalars["step"].assign(4)
        optimizer._iterations.assign(4)
    optimizer.broadcast(model.variables)
    momentum = optimizer.inner_optimizer.momentums[0].numpy()
    return [*held(model), momentum, np.array([optimizer.steps, int(optimizer.iterations)])]


def half(seed: int = 0) -> dict[str, Any]:
    """Train in mixed_float16 with fit, on batches that overflow on one worker alone."""
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        model = net()
        optimizer = SlowMo(keras.optimizers.LossScaleOptimizer(SGD(0.01)), SlowMoConfig(tau=3))
        overflows = np.random.default_rng([seed, hvd.rank()]).random(12) < 0.3

        def data(rank: int, k: int) -> Any:
            x, y = batch(rank, k)
            return x * (60000.0 if overflows[k] else 1.0), y * (1e38 if overflows[k] else 1.0)

        fit(model, optimizer, range(12), rank=hvd.rank(), data=data, callbacks=[SlowMoCallback()])
        scale = float(optimizer.inner_optimizer.dynamic_scale)
        return {"weights": held(model), "steps": optimizer.steps, "scale": scale}
    finally:
        keras.mixed_precision.set_dtype_policy("float32")


def compiled_by_xla() -> list[Any]:
    """Train with jit_compile=True and the callback, which turns XLA off."""
    model = net(hvd.rank())
    options = {"callbacks": [SlowMoCallback()], "compiled": {"jit_compile": True}}
    fit(model, SlowMo(SGD(0.1), SlowMoConfig(tau=2)), range(4), rank=hvd.rank(), **options)
    return held(model)


def halves(sets: list[list[int]]) -> list[float]:
    """Train two process sets independently."""
    mine = [hvd.add_process_set(ranks) for ranks in sets]
    own = next(s for s in mine if s.included())
    v = keras.Variable(np.full(2, 8.0, "float32"), name="v")
    optimizer = SlowMo(SGD(1.0), SlowMoConfig.local_sgd(2), process_set=own)
    optimizer.broadcast([v])
    for _ in range(2):
        optimizer.apply([tf.fill([2], float(hvd.rank()))], [v])
    return [float(x) for x in v.numpy()]


def handed_out(small: int) -> list[np.ndarray]:
    """Return what rank 0 hands out: frozen variables and Adam's state; `small` bytes at most are gathered."""
    bulk.SMALL_BYTES = small
    rank = hvd.rank()
    random = np.random.default_rng(rank)
    layers = [keras.layers.Dense(40), keras.layers.Dense(40, trainable=False)]
    layers.append(keras.layers.Dense(40, trainable=False, dtype="bfloat16"))
    model = keras.Sequential([keras.Input((40,)), *layers])
    inner = keras.optimizers.Adam()
    inner.build(model.trainable_variables)
    for v in [*model.non_trainable_variables, *(v for v in inner.variables if len(v.shape) == 2)]:
        v.assign(random.normal(size=v.shape))
    odd = layers[1].bias
    odd.assign(
        np.resize(np.array([-0.0, np.inf, 1e-45], np.float32), odd.shape) if rank == 0 else random.normal(size=40)
    )
    SlowMo(inner, SlowMoConfig(tau=3)).broadcast(model)
    return [np.asarray(v.numpy()).reshape(-1).view(np.uint8) for v in [*model.variables, *inner.variables]]
