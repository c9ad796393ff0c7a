"""Elastic jobs in Keras: `slowmo.elastic.State` and `slowmo.elastic.run`."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import keras

from hvd_slowmo.comm.elastic import Change, ElasticState, run_with
from hvd_slowmo.comm.launcher import elastic
from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo_tf.fit.model_parts import ModelPart, find_optimizers, split_model
from hvd_slowmo_tf.horovod import lost_worker, workers
from hvd_slowmo_tf.membership import reform
from hvd_slowmo_tf.model.layout import parts_of
from hvd_slowmo_tf.optimizer import SlowMo
from hvd_slowmo_tf.startup import fail_together

__all__ = ["Change", "State", "run"]

_NO_LAUNCHER = (
    "the elastic.State of a Keras worker with a parameter_map needs the elastic launcher: without it PyTorch workers "
    "start in SlowMo's constructor, and Keras workers in fit(). Give horovodrun a --host-discovery-script, or train "
    "without the State."
)

run = run_with("horovod.tensorflow", lost_worker)
"""Decorate the function that trains: it is called again whenever workers were lost or added.

Its first argument is a `State`. Nothing before its call may communicate.
"""


class State(ElasticState):
    """The state of an elastic job: a model and its optimizers, and values that are the same on all workers.

    A lost worker costs its own part of the current block and nothing else. A new worker starts at the anchor, with the
    leader's inner state. The model's train function is traced anew for the present workers.

    Args:
        model: built; becomes an attribute.
        optimizer: its SlowMo, or a sequence of them; None for those among the model's attributes. Becomes an attribute.
        values: see `hvd_slowmo.comm.elastic.ElasticState`. `SlowMoCallback(state=...)` counts `epoch`.

    Raises:
        TypeError: an optimizer is no SlowMo, or the model has none.
        ValueError: the model has no variables yet, or an optimizer has other workers than Horovod's.

    Example:
        >>> import numpy as np
        >>> import hvd_slowmo.tf as slowmo
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model.compile(slowmo.SlowMo("sgd", tau=2), "mse")
        >>> @slowmo.elastic.run
        ... def train(state):
        ...     x, callback = np.ones((8, 3)), slowmo.SlowMoCallback(state=state)
        ...     state.model.fit(
        ...         x, x[:, :1], 2, 3, initial_epoch=state.epoch, verbose=0, callbacks=[callback]
        ...     )
        ...     return state.epoch, state.optimizer.steps
        >>> train(slowmo.elastic.State(model, epoch=0))
        (3, 12)
    """

    framework = "Keras"

    def __init__(self, model: keras.Model, optimizer: SlowMo | Sequence[SlowMo] | None = None, **values: Any) -> None:
        if not isinstance(model, keras.Model):
            raise TypeError(f"`model` must be a keras.Model. Received: {type(model).__name__}")
        if not model.built:
            raise ValueError(
                f"{model.name} has no variables yet, which the workers are to compare: begin it with keras.Input, or "
                "call model.build(input_shape)."
            )
        given = () if optimizer is None else (optimizer,) if isinstance(optimizer, SlowMo) else tuple(optimizer)
        for each in given:
            if not isinstance(each, SlowMo):
                raise TypeError(f"`optimizer` must be a SlowMo or a sequence of them. Received: {type(each).__name__}")
        optimizers = find_optimizers(model, given)
        for each in optimizers:
            if elastic() and not each.worker.elastic:
                raise ValueError("an elastic job trains over all of Horovod's ranks: construct SlowMo without comm=.")
        self.model = model
        self.optimizer = optimizers[0] if len(optimizers) == 1 else optimizers
        super().__init__([_Elastic(model, optimizers, number) for number in range(len(optimizers))], values)

    def notice(self) -> None:
        super().notice()
        # A fit() that was broken off holds the threads of its data and its traces, in cycles of references.
        gc.collect()


class _Elastic:
    """`hvd_slowmo.comm.elastic.ElasticOptimizer` of a SlowMo.

    Args:
        model: that is trained.
        optimizers: all of the model's.
        number: of this one.
    """

    def __init__(self, model: keras.Model, optimizers: Sequence[SlowMo], number: int) -> None:
        self._model, self._optimizers, self._number = model, optimizers, number
        self._optimizer = optimizers[number]

    @property
    def steps(self) -> int:
        return self._optimizer.steps

    def come_together(self) -> tuple[ScopedComm, Sequence[int], Sequence[int], Sequence[int]]:
        worker = self._optimizer.worker
        if not elastic():  # SlowMoCallback or `broadcast` brings the workers to one start
            if worker.job is None and worker.parameter_map is not None and worker.comm.size > 1:
                fail_together(worker, ValueError(_NO_LAUNCHER))
            return worker.comm, range(worker.comm.size), (), ()
        self._model.train_function = None  # a trace has the number of workers in it
        self._model._eval_epoch_iterator = None  # of a fit() that has not come to its end
        alone = len(self._optimizers) == 1
        part = ModelPart(*parts_of(self._model)) if alone else split_model(self._model, self._optimizers)[self._number]
        reformed = reform(worker, workers.connect(), *part, self._model if alone else None)
        return worker.comm, reformed.order, reformed.newcomers, reformed.behind

    def leave(self) -> None:
        """Do nothing: a trace leaves nothing in flight."""

    def hear(self) -> None:
        step = self._optimizer.worker.step
        if step is not None:
            step.assembly.runtime.regrouping.heard.set(1)

    def agreed(self) -> bool:
        worker = self._optimizer.worker
        if worker.step is None:
            return False
        heard, agreed = worker.step.assembly.runtime.regrouping
        return bool(agreed.get()) or (worker.comm.size == 1 and bool(heard.get()))  # alone it may never meet anybody
