"""A Keras worker that comes and goes, on a variable instead of a model."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.comm.threads import ThreadWorld, WorldError
from hvd_slowmo.tf import SlowMo, SlowMoConfig
from hvd_slowmo_tf.membership import reform
from support.membership import BETA, CHUNKS, GRADIENTS, LENGTH, LR, TAU, Breaking, Killed
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


def lost(make, work, **settings):
    """Let three workers do this until each has noticed that the last one is lost; return the other two.

    Args:
        make: class of the workers.
        work: takes a worker, whose `broken` is its connection.
        settings: of the workers.
    """

    def before(comm):
        broken = Breaking(comm, WorldError if comm.rank < 2 else Killed)
        member = make(comm.rank, broken, **settings)
        member.reform(broken)
        member.broken = broken
        work(member)
        return member

    return ThreadWorld(3).run(before)[:2]


def train_until_lost(member):
    """Train until an exchange fails."""
    with pytest.raises(tf.errors.OpError):
        member.train(10 * TAU)
