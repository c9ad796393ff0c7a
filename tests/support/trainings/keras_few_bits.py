"""Train a matrix and a bias in few bits under Keras, as tests/support/few_bits.py does under PyTorch."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvd_slowmo.tf import SlowMo, SlowMoConfig
from support.trainings.keras import GraphComm, horovod_rank

SHAPE = (50, 70)


def build(
    comm: Any, lr: float = 0.125, start: bool = True, metrics: bool = False, **settings: Any
) -> tuple[list[keras.Variable], SlowMo]:
    rng = np.random.default_rng(0)
    weights = [
        keras.Variable(rng.normal(size=SHAPE), dtype="float32", name="weight"),
        keras.Variable(rng.normal(size=5), dtype="float32", name="bias"),
    ]
    config = SlowMoConfig(**{"tau": 4, "bits": 8, **settings})
    where = {} if comm is None else {"comm": GraphComm(comm)}
    optimizer = SlowMo(keras.optimizers.SGD(lr), config, metrics=metrics, **where)
    if start:
        optimizer.broadcast(weights)
    return weights, optimizer


def step(weights: list[keras.Variable], optimizer: SlowMo, rank: int, k: int, apply: Any = None) -> None:
    """Take a step.

    Args:
        apply: takes the gradients; None for `optimizer.apply`.
    """
    places = [np.random.default_rng([rank, k]).normal(size=v.shape).astype(np.float32) for v in weights]
    gradients = [v.numpy() - place for v, place in zip(weights, places, strict=True)]
    own = [tf.constant(g) for g in gradients]
    apply(own) if apply else optimizer.apply(own, weights)


def trained(settings: dict[str, Any], comm: Any = None) -> dict[str, np.ndarray]:
    """Train a few steps on a worker of a pool, or of a world; the workers have different numbers of steps."""
    rank = horovod_rank() if comm is None else comm.rank
    weights, optimizer = build(comm, **settings)
    for k in range(13 + rank):
        step(weights, optimizer, rank, k)
    optimizer.join(weights)
    return {v.name: v.numpy() for v in weights}
