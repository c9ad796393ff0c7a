"""SlowMo under `model.fit`: one start for all workers, a join after every epoch's batches, and the workers' metrics."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import keras

from hvd_slowmo.checkpoint.periodic import Checkpoints
from hvd_slowmo.comm.elastic import ElasticState
from hvd_slowmo.core.regroup.join import join
from hvd_slowmo.core.step import preemption
from hvd_slowmo_tf.fit.epoch_metrics import MetricState, WorkerLogs, numbers_in, over_workers, states_of
from hvd_slowmo_tf.fit.fit_checkpoints import FitCheckpoints
from hvd_slowmo_tf.fit.horovod_callbacks import refusal
from hvd_slowmo_tf.fit.model_parts import build_from_batch, find_optimizers, other_optimizers, split_model
from hvd_slowmo_tf.optimizer import SlowMo
from hvd_slowmo_tf.startup import fail_together, start_together
from hvd_slowmo_tf.traces.failed_traces import initialize

Logs = dict[str, Any]
"""Metrics by name: floats, or scalar arrays of NumPy and TensorFlow."""

logger = logging.getLogger("hvd_slowmo")


class SlowMoCallback(keras.callbacks.Callback):
    """Keep the workers of a `fit` together; every worker gives one to its `fit`.

    - Before the first batch trains, after every callback's `on_train_begin` (which may load a checkpoint):
      `SlowMo.broadcast`. A model that has no variables yet is built from the first batch's shapes.
    - Several optimizers in a custom `train_step` are kept together alike. Each one averages the variables that it
      trains and the statistics of their layers.
    - After an epoch's batches, before validation and before other callbacks see the model: `SlowMo.join`. Workers may
      have different numbers of batches. Where the epoch is a multiple of tau nothing changes.
    - Training and validation metrics become those of all workers, before other callbacks see them: ReduceLROnPlateau
      and EarlyStopping decide alike everywhere. The states of Keras' metrics are added up; other values are averaged,
      weighted by samples. In a job with workers of another framework, which have no such metrics, they stay each
      worker's own.
    - A worker that ends its training early (fewer epochs, an EarlyStopping that only it has) ends the others' after the
      epoch that they are in.
    - With `checkpoints`, the newest one is resumed before the first batch: model, optimizer and epoch. Saves
      follow between epochs, and with `Checkpoints(..., every=n)` within an epoch too, which a resume then begins again.
    - After a signal (`on_preemption`) all workers save and end after a batch.
    - With the `state` of an elastic job: `commit` after each batch. `state.epoch`, where the state has this value,
      becomes the epoch to begin with. One in which the workers change is taken once more, by the parameters that the
      survivors have. `checkpoints` are resumed where no worker has made a step.
    - XLA, which can't compile the exchange, is switched off for this model's training.

    It goes to the front of the list of callbacks by itself.

    Args:
        *optimizers: the SlowMo optimizers of a model with a custom `train_step`. Without any: all among the model's
            attributes, and in its lists and dicts.
        checkpoints: saves and resumes the job, for a model with one SlowMo optimizer.
        state: of an elastic job (`slowmo.elastic.State`).

    Raises:
        TypeError: no optimizer of the model is SlowMo, or an argument has another type.
        ValueError: on every rank, as `SlowMo.broadcast` and `SlowMo.join`, or if one has a callback of Horovod's.

    Example:
        >>> import numpy as np
        >>> from hvd_slowmo.tf import SlowMo, SlowMoCallback, SlowMoConfig
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model.compile(SlowMo(keras.optimizers.SGD(0.1), SlowMoConfig(tau=2)), "mse")
        >>> x, y = np.ones((8, 3)), np.ones((8, 1))
        >>> history = model.fit(x, y, batch_size=4, epochs=3, verbose=0, callbacks=[SlowMoCallback()])
        >>> model.optimizer.steps
        6
    """

    def __init__(
        self, *optimizers: SlowMo, checkpoints: Checkpoints | None = None, state: ElasticState | None = None
    ) -> None:
        super().__init__()
        for optimizer in optimizers:
            if not isinstance(optimizer, SlowMo):
                raise TypeError(f"SlowMoCallback takes SlowMo optimizers. Received: {type(optimizer).__name__}")
        if checkpoints is not None and not isinstance(checkpoints, Checkpoints):
            raise TypeError(f"`checkpoints` must be Checkpoints. Received: {type(checkpoints).__name__}")
        if state is not None and not isinstance(state, ElasticState):
            raise TypeError(f"`state` must be a slowmo.elastic.State. Received: {type(state).__name__}")
        self._given = optimizers
        self._state = state
        self._fit_checkpoints = None if checkpoints is None else FitCheckpoints(checkpoints)
        self._optimizers: Sequence[SlowMo] = ()
        self._place_known = self._begun = self._in_epoch = self._left = False
        self._refusal: ValueError | None = None  # of the other callbacks
        self._epoch = 0  # of this worker
        self._calls = 0  # of the first optimizer, before the epoch
        self._validation_batches = 0
        self._training: tuple[float, dict[str, MetricState]] = 0.0, {}  # this epoch's metrics and their weight
        self._validation: tuple[float, dict[str, MetricState]] = 0.0, {}
        self._warned: set[str] = set()  # values that no metric is behind

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._optimizers = find_optimizers(model, self._given)
        if len(self._optimizers) > 1 and self._saves:
            raise ValueError(
                "Checkpoints and on_preemption() save the job of one optimizer, and this model has "
                f"{len(self._optimizers)} SlowMo optimizers. Call save() of each of them in a callback."
            )
        self._go_first()
        if model.jit_compile:
            logger.info("XLA is switched off for the training of %s: it can't compile SlowMo's exchange", model.name)
            model.jit_compile = False
            model.train_function = None  # fit makes it anew, after this

    def _go_first(self) -> None:
        """Move to the front: the other callbacks must see the model and the metrics that this one leaves.

        Keras does not tell a callback the list that it is in, but it is the list that calls `set_model`.
        """
        frame = sys._getframe(2)
        caller: Any = frame.f_locals.get("self")
        self._place_known = isinstance(caller, keras.callbacks.CallbackList) and self in caller.callbacks
        if self._place_known:
            caller.callbacks.remove(self)
            caller.callbacks.insert(0, self)
            self._refusal = refusal(caller.callbacks)

    def on_train_begin(self, logs: Logs | None = None) -> None:
        if not self._place_known:
            raise ValueError(
                "SlowMoCallback is not in a list of callbacks that it can go to the front of. Give it to fit() as one "
                "of callbacks=[...], not within another callback."
            )
        self._begun = self._in_epoch = self._left = False
        if self._fit_checkpoints is not None:
            self._fit_checkpoints.find(self.model, self._first)
            if hasattr(self._state, "epoch") and self.model._initial_epoch is not None:
                setattr(self._state, "epoch", self.model._initial_epoch)  # noqa: B010 - as in `on_epoch_end`
        if self._refusal is not None:  # before the others' on_train_begin, which may fail here alone
            fail_together(self._first.worker, self._refusal)
        self._explain_errors()

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        if self._begun:
            self._between_epochs(epoch)
        self._in_epoch, self._epoch = True, epoch
        self._calls = self._calls_made()
        if self._begun:
            return
        built = self.model.built if len(self._optimizers) == 1 else all(each.built for each in self._optimizers)
        if built:
            self._begin()
        else:
            self._begin_with_first_batch()

    def on_test_begin(self, logs: Logs | None = None) -> None:
        self._end_of_batches()
        self._validation_batches = 0

    def on_test_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        self._validation_batches = batch + 1

    def on_test_end(self, logs: Logs | None = None) -> None:
        self._validation = self._measured(self._validation_batches)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        self._end_of_batches()
        job = self._first.worker.job
        if logs is not None and not self._left and job is not None and not job.mixed:
            self._average(logs)
        if hasattr(self._state, "epoch"):
            setattr(self._state, "epoch", epoch + 1)  # noqa: B010 - a value that the user has named

    def on_train_end(self, logs: Logs | None = None) -> None:
        if self._begun and not self._left:
            for optimizer in self._optimizers:
                optimizer.worker.fingerprint.end()  # Keras' moving average is in the model already
            self._between_epochs(self._epoch + 1)
            self._join(self._optimizers, leaving=True)

    @property
    def on_train_batch_end(self) -> Callable[..., None]:
        """Keras' hook after a batch.

        With a hook that is not the default in any callback, Keras waits for every batch; and in this thread, which
        collectives need. A job that saves nothing keeps the default and its speed.
        """
        return self._after_batch if self._saves or self._state is not None else super().on_train_batch_end

    @property
    def _saves(self) -> bool:
        return self._fit_checkpoints is not None or preemption.saves_to() is not None

    def _after_batch(self, batch: int, logs: Logs | None = None) -> None:
        """Save within an epoch, where all workers are together; end after a signal."""
        if not self._begun:
            return
        if self._fit_checkpoints is not None:
            self._fit_checkpoints.after_batch(self._epoch)
        self._end_if_asked()
        if self._state is not None:
            self._state.commit()

    def _between_epochs(self, epoch: int) -> None:
        """Save where all workers have come out of the join: at the begin of this epoch, or where they end with it.

        Other callbacks have seen the end of the epoch before, and what they have changed is saved.
        """
        if self._fit_checkpoints is not None and not self._left:
            self._fit_checkpoints.between_epochs(epoch)
        self._end_if_asked()

    def _end_if_asked(self) -> None:
        if self._saves:
            roll, steps = self._first.worker.roll, self._first.steps
            preemption.tell(roll)
            preemption.save_and_end(roll, steps, partial(self._first.save, model=self.model))

    @property
    def _first(self) -> SlowMo:
        """The optimizer whose workers exchange what the whole model has in common."""
        return self._optimizers[0]

    def _begin(self, build: Callable[[], None] | None = None) -> None:
        """Bring all workers to one start; `build` makes the model's variables before."""
        try:
            if build is not None:
                build()
            initialize(self.model)
            several = len(self._optimizers) > 1
            parts = split_model(self.model, self._optimizers) if several else []
        except Exception as error:  # whatever it is, the other workers wait in their start and must hear of it
            fail_together(self._first.worker, error)
        if not several:
            self._first.broadcast(self.model)
        for optimizer, part in zip(self._optimizers, parts, strict=False):
            start_together(optimizer.worker, *part)
        self._begun = True
        if self._fit_checkpoints is not None:
            self._fit_checkpoints.restore()
        worker = self._first.worker
        assert worker.job is not None, "started"
        if worker.job.mixed:  # the others have no epochs that could be compared
            return
        comm = worker.comm
        others = other_optimizers(self.model)
        if others and comm.rank == 0 and comm.size > 1:
            logger.warning(
                "%s also trains variables with %s, and workers average those of SlowMo optimizers only. Wrap these "
                "optimizers in SlowMo too.",
                self.model.name,
                ", ".join(others),
            )
        epochs = comm.gather("epoch", self._epoch)
        if len(set(epochs)) > 1 and comm.rank == 0:
            logger.warning(
                "the workers begin at different epochs: %s. Callbacks that depend on the epoch will differ, and all "
                "workers end with the first one; give every rank a BackupAndRestore with another directory, or set "
                "initial_epoch.",
                ", ".join(f"rank {r} at {e}" for r, e in zip(comm.ranks, epochs, strict=True)),
            )

    def _begin_with_first_batch(self) -> None:
        model, function = self.model, self.model.train_function

        def first_call(iterator: Iterator[Any]) -> Logs:
            model.train_function = function
            # Shapes are enough, and a tf.data iterator can't give a batch back.
            spec = getattr(iterator, "element_spec", None)
            if spec is None:
                raise ValueError(
                    f"{model.name} or an optimizer of it is not built. Before fit(run_eagerly=True), call the model on "
                    "a batch of data and, where it has several optimizers, optimizer.build(variables) of each."
                )
            self._begin(partial(build_from_batch, model, self._optimizers, spec))
            logs: Logs = function(iterator)
            return logs

        model.train_function = first_call

    def _end_of_batches(self) -> None:
        if not self._in_epoch:
            return
        self._in_epoch = False
        if not self._begun:
            # No batch and no variables: the others wait in their start, and must hear of it.
            self._first.broadcast([])
        self._training = self._measured(self._calls_made() - self._calls)
        left = self._join(self._optimizers)
        if left:
            self._left = True
            self.model.stop_training = True
            logger.info("ranks %s have ended their training, so this worker ends its own", left)

    def _join(self, optimizers: Sequence[SlowMo], leaving: bool = False) -> list[int]:
        """Join the workers of each optimizer; return the ranks that have left for good. A collective."""
        if len(optimizers) == 1:
            return sorted(optimizers[0].join(leaving=leaving).left)
        return sorted({rank for result in join(*optimizers, leaving=leaving) for rank in result.left})

    def _calls_made(self) -> int:
        return int(self._first.iterations.numpy())

    def _measured(self, batches: int) -> tuple[float, dict[str, MetricState]]:
        """Return the number of samples that Keras' loss has counted, or else of batches, and the metrics' states."""
        metrics = self.model.metrics
        counts = [float(m.count.numpy()) for m in metrics if m.name == "loss" and hasattr(m, "count")]
        return (counts[0] if counts and counts[0] else float(batches)), states_of(metrics)

    def _average(self, logs: Logs) -> None:
        """Set the metrics to those of all workers, in place: all callbacks get the same dict."""
        comm = self._first.worker.comm
        own = numbers_in(logs)
        training = WorkerLogs({k: v for k, v in own.items() if not k.startswith("val_")}, *self._training)
        validation = WorkerLogs(
            {k.removeprefix("val_"): v for k, v in own.items() if k.startswith("val_")}, *self._validation
        )
        everyone = comm.gather("logs", (training, validation))
        for prefix, each in (("", [pair[0] for pair in everyone]), ("val_", [pair[1] for pair in everyone])):
            found = over_workers(self.model.metrics, each)
            logs |= {prefix + key: float(v) if v.ndim == 0 else v for key, v in found.values.items()}
            self._warn_of_means([prefix + key for key in found.averaged])

    def _warn_of_means(self, names: list[str]) -> None:
        new = [name for name in names if name not in self._warned]
        self._warned.update(new)
        comm = self._first.worker.comm
        if new and comm.rank == 0 and comm.size > 1:
            logger.warning(
                "%s: no metric of Keras has these values as its result, so they are the workers' means, weighted by "
                "samples (by batches where Keras' own loss counts no samples). That is right for means alone.",
                ", ".join(new),
            )

    def _explain_errors(self) -> None:
        """Put the errors and warnings of Keras' traced function into plain words."""
        model = self.model
        train = model.train_function
        if getattr(train, "explains_errors", False):
            return
        for optimizer in self._optimizers:
            train = partial(optimizer.worker.call, train)
        train.explains_errors = True
        model.train_function = train
