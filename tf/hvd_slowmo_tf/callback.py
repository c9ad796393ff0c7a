"""SlowMo under `model.fit`: one start for all workers, a join after every epoch's batches, and the workers' metrics."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from numbers import Real
from typing import Any

import keras

from hvd_slowmo_tf.optimizer import SlowMo

Logs = dict[str, Any]
"""Metrics by name: floats, or scalar arrays of NumPy and TensorFlow."""

logger = logging.getLogger("hvd_slowmo")


class SlowMoCallback(keras.callbacks.Callback):
    """Keep the workers of a `fit` together; every worker gives one to its `fit`.

    - Before the first batch trains, after every callback's `on_train_begin` (which may load a checkpoint):
      `SlowMo.broadcast`. A model that has no variables yet is built from the first batch's shapes.
    - After an epoch's batches, before validation and before other callbacks see the model: `SlowMo.join`. Workers may
      have different numbers of batches. Where the epoch is a multiple of tau nothing changes.
    - Training and validation metrics become the workers' means, weighted by samples, before other callbacks see them:
      ReduceLROnPlateau and EarlyStopping decide alike everywhere. In a job with workers of another framework, which
      have no such metrics, they stay each worker's own.
    - A worker that ends its training early (fewer epochs, an EarlyStopping that only it has) ends the others' after the
      epoch that they are in.
    - XLA, which can't compile the exchange, is switched off for this model's training.

    It goes to the front of the list of callbacks by itself.

    Raises:
        TypeError: the model's optimizer is not SlowMo.
        ValueError: on every rank, as `SlowMo.broadcast` and `SlowMo.join`.

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

    def __init__(self) -> None:
        super().__init__()
        self._place_known = self._begun = self._in_epoch = self._left = False
        self._epoch = 0  # of this worker
        self._samples = 0.0  # number of samples behind this epoch's metrics
        self._validation_samples = 0.0

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        if not isinstance(getattr(model, "optimizer", None), SlowMo):
            found = type(getattr(model, "optimizer", None)).__name__
            raise TypeError(f"SlowMoCallback needs a model compiled with SlowMo. Its optimizer is: {found}")
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

    def on_train_begin(self, logs: Logs | None = None) -> None:
        if not self._place_known:
            raise ValueError(
                "SlowMoCallback is not in a list of callbacks that it can go to the front of. Give it to fit() as one "
                "of callbacks=[...], not within another callback."
            )
        self._begun = self._in_epoch = self._left = False
        self._explain_errors()

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self._in_epoch, self._epoch = True, epoch
        if self._begun:
            return
        if self.model.built:
            self._begin()
        else:
            self._begin_with_first_batch()

    def on_test_begin(self, logs: Logs | None = None) -> None:
        self._end_of_batches()

    def on_test_end(self, logs: Logs | None = None) -> None:
        self._validation_samples = self._samples_seen()

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        self._end_of_batches()
        if logs is not None and not self._left and not self.model.optimizer.worker.job.mixed:
            self._average(logs)

    def on_train_end(self, logs: Logs | None = None) -> None:
        if self._begun and not self._left:
            self.model.optimizer.join(leaving=True)

    def _begin(self) -> None:
        self.model.optimizer.broadcast(self.model)
        self._begun = True
        worker = self.model.optimizer.worker
        if worker.job.mixed:  # the others have no epochs that could be compared
            return
        comm = worker.comm
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
                raise ValueError(f"{model.name} is not built. Call it on a batch of data before fit(run_eagerly=True).")
            model._symbolic_build(data_batch=spec)
            self._begin()
            logs: Logs = function(iterator)
            return logs

        model.train_function = first_call

    def _end_of_batches(self) -> None:
        if not self._in_epoch:
            return
        self._in_epoch = False
        if not self._begun:
            # No batch and no variables: the others wait in their start, and must hear of it.
            self.model.optimizer.broadcast([])
        self._samples = self._samples_seen()
        result = self.model.optimizer.join()
        if result.left:
            self._left = True
            self.model.stop_training = True
            logger.info("ranks %s have ended their training, so this worker ends its own", list(result.left))

    def _samples_seen(self) -> float:
        """Return the number of samples behind the metrics, which Keras' own loss has counted."""
        counts = [float(m.count.numpy()) for m in self.model.metrics if m.name == "loss" and hasattr(m, "count")]
        return counts[0] if counts else 1.0

    def _average(self, logs: Logs) -> None:
        """Set the metrics to the workers' means, in place: all callbacks get the same dict."""
        own = {
            key: (float(value), self._validation_samples if key.startswith("val_") else self._samples)
            for key, value in logs.items()
            if isinstance(value, Real) or getattr(value, "shape", None) == ()
        }
        everyone = self.model.optimizer.worker.comm.gather("logs", own)
        for key in dict.fromkeys(key for each in everyone for key in each):
            pairs = [each[key] for each in everyone if key in each]
            total = sum(samples for _, samples in pairs)
            if total > 0:
                logs[key] = sum(value * samples for value, samples in pairs) / total

    def _explain_errors(self) -> None:
        """Put the errors and warnings of Keras' traced function into plain words."""
        model = self.model
        inner = model.train_function
        if getattr(inner, "explains_errors", False):
            return

        def train(iterator: Iterator[Any]) -> Logs:
            logs: Logs = model.optimizer.worker.call(inner, iterator)
            return logs

        train.explains_errors = True  # type: ignore[attr-defined]
        model.train_function = train
