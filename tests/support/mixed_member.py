"""A worker of an elastic job of both frameworks, on one dense layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import hvd_slowmo.tf as slowmo_tf
import hvd_slowmo.torch as slowmo_torch
from hvd_slowmo.comm.threads import ThreadWorld, WorldError
from hvd_slowmo_tf.membership import reform as reform_keras
from hvd_slowmo_torch.membership import reform as reform_torch
from support import keras_member
from support.membership import BETA, CHUNKS, GRADIENTS, LENGTH, LR, TAU, Killed
from support.trainings.keras import GraphComm, doubles
from support.trainings.mixed import TorchComm

LOST = (tf.errors.OpError, WorldError, Killed)


class ShortTorch(slowmo_torch.SlowMo):
    _chunk_bytes = 8 * LENGTH // CHUNKS


class ShortKeras(slowmo_tf.SlowMo):
    _chunk_bytes = 8 * LENGTH // CHUNKS


class _InTurn(TorchComm):
    """Exchanges beside the training take their turn where they are waited for, as those of a trace do.

    A `ThreadWorld` matches collectives by their order, and Keras workers have no others beside.
    """

    def start_beside(self, work):
        return work

    def wait(self, handle):
        return handle(self) if callable(handle) else super().wait(handle)


class TorchMember:
    """A PyTorch worker that has not been started.

    Args:
        number: of the worker at first, by which it has its gradient.
        settings: of SlowMo, and `momentum` of the inner SGD.
    """

    def __init__(self, number, **settings):
        settings = {"tau": TAU, "beta": BETA, **settings}
        torch.manual_seed(number)
        self.number = number
        self._layer = torch.nn.Linear(LENGTH, 1, bias=False, dtype=torch.float64)
        model = torch.nn.Sequential(self._layer)
        inner = torch.optim.SGD(model.parameters(), lr=LR, momentum=settings.pop("momentum", 0.0))
        config, alone = slowmo_torch.SlowMoConfig(**settings), ThreadWorld(1).member(0)
        self.optimizer = ShortTorch(inner, model, config, comm=alone, parameter_map=slowmo_torch.ParameterMap())
        self.optimizer.worker.elastic, self.optimizer.worker.started = True, False

    def reform(self, comm):
        return reform_torch(self.optimizer.worker, _InTurn(comm))

    def train(self, steps):
        for _ in range(steps):
            self._layer.weight.grad = torch.tensor(GRADIENTS[self.number])[None]
            self.optimizer.step()

    def join(self):
        self.optimizer.join()

    @property
    def values(self):
        return self._layer.weight.detach().numpy()[0].copy()

    def vector(self, name):
        return self.optimizer.worker.store.vectors[name][0].numpy().copy()

    @property
    def momentum(self):
        """Of the inner SGD, LR times the sum that PyTorch keeps."""
        state = self.optimizer.inner_optimizer.state[self._layer.weight]
        return LR * state["momentum_buffer"].numpy()[0] if "momentum_buffer" in state else np.zeros(LENGTH)


class KerasMember:
    """A Keras worker that has not been started; see `TorchMember`. Its steps are traced, as those of `fit`."""

    def __init__(self, number, **settings):
        settings = {"tau": TAU, "beta": BETA, **settings}
        self.number = number
        self._layer = keras.layers.Dense(1, use_bias=False)
        self._model = keras.Sequential([keras.Input((LENGTH,)), self._layer])
        self._layer.kernel.assign(np.random.default_rng(number).standard_normal((LENGTH, 1)))
        inner = keras.optimizers.SGD(LR, momentum=settings.pop("momentum", 0.0))
        config, alone = slowmo_tf.SlowMoConfig(**settings), GraphComm(ThreadWorld(1).member(0))
        self.optimizer = ShortKeras(inner, config, comm=alone, parameter_map=slowmo_tf.ParameterMap())
        self.optimizer.worker.elastic = True

    def reform(self, comm):
        self._step = tf.function(self._apply)  # with the present workers in it
        return reform_keras(self.optimizer.worker, GraphComm(comm), self._model.variables, [], self._model)

    def train(self, steps):
        gradient = tf.constant(GRADIENTS[self.number][:, None])
        for _ in range(steps):
            self._step(gradient)

    def _apply(self, gradient):
        self.optimizer.apply([gradient], [self._layer.kernel])

    def join(self):
        self.optimizer.join(self._model)

    @property
    def values(self):
        return self._layer.kernel.numpy()[:, 0].copy()

    def vector(self, name):
        return np.concatenate([v.numpy() for v in self.optimizer.worker.variables.vectors[name].values()])

    @property
    def momentum(self):
        """Of the inner SGD, in units of the parameters and against the gradient."""
        return -self.optimizer.inner_optimizer.momentums[0].numpy()[:, 0]


KINDS = {"torch": TorchMember, "keras": KerasMember}


def train_until_lost(member):
    """Train until an exchange fails."""
    with pytest.raises(LOST):
        member.train(10 * TAU)


def lost(kinds, work, **settings):
    """Let three workers do this until each has noticed that the last one is lost; return the other two."""

    def make(rank, _, **settings):
        return KINDS[kinds[rank]](rank, **settings)

    with doubles():
        return keras_member.lost(make, work, **settings)


def again(members, then, new=(), **settings):
    """Bring workers together, let each train for so many steps, and return what `then` returns.

    Args:
        new: kinds of those that are new, behind the survivors.
        settings: theirs.
    """

    def after(comm):
        if comm.rank < len(members):
            member = members[comm.rank]
        else:
            member = KINDS[new[comm.rank - len(members)]](comm.rank, **settings)
        reformed = member.reform(comm)
        return then(member, reformed)

    with doubles():
        return ThreadWorld(len(members) + len(new)).run(after)
