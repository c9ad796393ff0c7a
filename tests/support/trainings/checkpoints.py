"""One model in both frameworks, trained alike on each worker's batches, for checkpoints across frameworks."""

from __future__ import annotations

from typing import Any

import numpy as np

from support.problems import config_of

START = {  # on the wire
    "0.linear.weight": (5, 4),
    "0.linear.bias": (5,),
    "1.linear.weight": (3, 5),
    "1.linear.bias": (3,),
}
RATE = 0.125
Base = tuple[str, dict[str, Any]]
"""SGD or Adam, with PyTorch's names of its options."""


def start(rank: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rank)
    return {name: rng.normal(size=shape) for name, shape in START.items()}


def batch(rank: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([rank, step])
    return rng.normal(size=(6, 4)), rng.normal(size=(6, 3))


class TorchWorker:
    """A PyTorch worker of `comm`, or of Horovod."""

    def __init__(
        self, config: dict[str, Any], base: tuple[str, dict[str, Any]], comm: Any = None, rank: int = 0
    ) -> None:
        import torch

        from hvd_slowmo.torch import SlowMo
        from hvd_slowmo_torch.interop.layers import entries_torch
        from hvd_slowmo_torch.interop.weights import read_torch, write_torch

        linear = torch.nn.Linear
        self.model = torch.nn.Sequential(linear(4, 5), torch.nn.Tanh(), linear(5, 3)).double()
        self.rank = rank if comm is None else comm.rank
        entries = entries_torch(self.model)
        write_torch(self.model, entries, start(self.rank))
        name, options = base
        options = {"betas": options["betas"], "eps": 2.0**-70} if "betas" in options else options
        sgd = getattr(torch.optim, name)(self.model.parameters(), lr=RATE, **options)
        settings = config_of(config)
        self.optimizer: Any
        if comm is None:
            self.optimizer = SlowMo(sgd, self.model, settings)
        else:
            self.optimizer = SlowMo(sgd, self.model, settings, comm=comm)
        self.values = lambda: {name: x.copy() for name, x in read_torch(self.model, entries).items()}

    def save(self, path: Any) -> None:
        self.optimizer.save(path)

    def load(self, path: Any) -> None:
        self.optimizer.load(path)

    def advance(self, steps: range) -> list[dict[str, np.ndarray]]:
        import torch

        history = []
        for step in steps:
            x, y = map(torch.tensor, batch(self.rank, step))
            self.optimizer.zero_grad()
            (self.model(x) - y).square().mean().backward()
            self.optimizer.step()
            history.append(self.values())
        return history


class KerasWorker:
    """The same worker in Keras; construct it within `keras_training.doubles`."""

    def __init__(
        self, config: dict[str, Any], base: tuple[str, dict[str, Any]], comm: Any = None, rank: int = 0
    ) -> None:
        import keras

        from hvd_slowmo.tf import SlowMo
        from hvd_slowmo_tf.interop.layers import entries_keras
        from hvd_slowmo_tf.interop.weights import read_keras, variables_of, write_keras
        from support.trainings.keras import GraphComm

        dense = keras.layers.Dense
        self.model = keras.Sequential([keras.Input((4,)), dense(5, activation="tanh"), dense(3)])
        self.rank = rank if comm is None else comm.rank
        entries = entries_keras(self.model)
        write_keras(variables_of(self.model), entries, start(self.rank))
        name, options = base
        if "betas" in options:
            options = {"beta_1": options["betas"][0], "beta_2": options["betas"][1], "epsilon": 2.0**-70}
        inner, settings = getattr(keras.optimizers, name)(RATE, **options), config_of(config)
        self.optimizer = SlowMo(inner, settings) if comm is None else SlowMo(inner, settings, comm=GraphComm(comm))
        self.optimizer.broadcast(self.model.variables)
        self.values = lambda: read_keras(variables_of(self.model), entries)

    def save(self, path: Any) -> None:
        self.optimizer.save(path, self.model)

    def load(self, path: Any) -> None:
        self.optimizer.load(path, self.model)

    def advance(self, steps: range) -> list[dict[str, np.ndarray]]:
        import tensorflow as tf

        history = []
        for step in steps:
            x, y = map(tf.constant, batch(self.rank, step))
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self.model(x, training=True) - y))
            variables = self.model.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            history.append(self.values())
        return history


SGD = ("SGD", {"momentum": 0.875, "nesterov": True})
ADAM = ("Adam", {"betas": (0.875, 0.9921875)})  # exact in float32, to which Keras rounds them
CASES: dict[str, tuple[dict[str, Any], Base]] = {
    "momentum": ({"tau": 4}, SGD),
    "Adam": ({"tau": 4, "inner_state": "average"}, ADAM),
    "reset": ({"tau": 3, "inner_state": "reset", "alpha": 0.8}, SGD),
    "osgp": ({"tau": 5, "gossip": "sgp", "topology": "star", "overlap": True}, SGD),
    "dpsgd": ({"tau": None, "alpha": 1.0, "beta": 0.0, "gossip": "dpsgd"}, ADAM),
}


def apart(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> float:
    """Return the largest difference of any value at any step."""
    return max(float(np.abs(x[name] - y[name]).max()) for x, y in zip(a, b, strict=True) for name in x)
