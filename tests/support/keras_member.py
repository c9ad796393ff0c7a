"""A Keras worker that comes and goes, on a variable instead of a model."""

import keras
import numpy as np
import tensorflow as tf

from hvd_slowmo.tf import SlowMo, SlowMoConfig
from hvd_slowmo_tf.membership import reform
from support.membership import BETA, CHUNKS, GRADIENTS, LENGTH, LR, TAU
from support.trainings.keras import GraphComm


class Short(SlowMo):
    _chunk_bytes = 8 * LENGTH // CHUNKS


class Member:
    """One worker: a variable and its optimizer, which has not been started.

    Args:
        rank: of the worker at first, by which it has its gradient.
        comm: the workers, who have not come together yet.
        traced: its steps are traced, as those of `fit`, where exchanges begin before the inner step.
        settings: of SlowMo, and `momentum` and `decay` of the inner SGD.
    """

    def __init__(self, rank, comm, traced=False, **settings):
        settings = {"tau": TAU, "beta": BETA, **settings}
        self.number = rank
        self.weight = keras.Variable(np.random.default_rng(rank).standard_normal(LENGTH), dtype="float64")
        inner = keras.optimizers.SGD(
            LR, momentum=settings.pop("momentum", 0.0), weight_decay=settings.pop("decay", None)
        )
        self.optimizer = Short(inner, SlowMoConfig(**settings), comm=GraphComm(comm))
        self.optimizer.worker.elastic = True
        self.start, self._traced = self.values, traced

    def reform(self, comm):
        self._step = tf.function(self._apply) if self._traced else self._apply  # with the present workers in it
        return reform(self.optimizer.worker, GraphComm(comm), [self.weight], [], None)

    def train(self, steps):
        gradient = tf.constant(GRADIENTS[self.number])
        for _ in range(steps):
            self._step(gradient)

    def _apply(self, gradient):
        self.optimizer.apply([gradient], [self.weight])

    @property
    def values(self):
        return self.weight.numpy().copy()

    def vector(self, name):
        return np.concatenate([v.numpy() for v in self.optimizer.worker.variables.vectors[name].values()])
