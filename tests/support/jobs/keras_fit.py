"""Jobs for Horovod workers (see ../pool.py): `fit` with SlowMoCallback."""

from __future__ import annotations

import logging
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import pytest
import tensorflow as tf
from horovod.tensorflow.keras.callbacks import LearningRateWarmupCallback

from hvd_slowmo.tf import SlowMo, SlowMoCallback, SlowMoConfig

BATCH = 4


def data(batches: int, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Return this worker's data."""
    x = np.random.default_rng([seed, hvd.rank()]).normal(size=(BATCH * batches, 4)).astype(np.float32)
    return x, x.sum(axis=1, keepdims=True)


class Subclassed(keras.Model):
    """Model without variables before its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = keras.layers.Dense(8)
        self.norm = keras.layers.BatchNormalization()
        self.out = keras.layers.Dense(1)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.out(self.norm(self.hidden(x), training=training))


def network(kind: str = "sequential") -> keras.Model:
    layers = keras.layers
    if kind == "subclassed":
        return Subclassed()
    if kind == "functional":
        x = keras.Input((4,))
        return keras.Model(x, layers.Dense(1)(layers.BatchNormalization()(layers.Dense(8)(x))))
    start = [] if kind == "unbuilt" else [keras.Input((4,))]
    return keras.Sequential([*start, layers.Dense(8), layers.BatchNormalization(), layers.Dense(1)])


def compiled(kind: str = "sequential", tau: int = 3, rate: float = 0.01, **options: Any) -> keras.Model:
    keras.utils.set_random_seed(hvd.rank())
    model = network(kind)
    model.compile(SlowMo(keras.optimizers.SGD(rate, momentum=0.5), SlowMoConfig(tau=tau)), "mse", **options)
    return model


def source(kind: str, batches: int) -> dict[str, Any]:
    """Return the data arguments of fit."""
    x, y = data(batches)
    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": BATCH, "shuffle": False}
    whole = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    if kind == "unknown":  # the number of batches is unknown until the data ends
        whole = whole.filter(lambda *_: True)
    return {"x": whole, "shuffle": False}


def held(model: keras.Model) -> dict[str, Any]:
    optimizer = model.optimizer
    vectors = optimizer.worker.variables.vectors
    return {
        "weights": [v.numpy() for v in model.weights],
        "vectors": [v.numpy() for name in sorted(vectors) for v in vectors[name].values()],
        "steps": optimizer.steps,
        "iterations": int(optimizer.iterations.numpy()),
        "traces": optimizer.worker.step.traces,
    }


class Log(logging.Handler):
    """Handler that records the library's log messages."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname}: {record.getMessage()}")

    def __enter__(self) -> list[str]:
        logger = logging.getLogger("hvd_slowmo")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self.lines

    def __exit__(self, *_: Any) -> None:
        logging.getLogger("hvd_slowmo").removeHandler(self)


class Seen(keras.callbacks.Callback):
    """Callback that records model and metrics at the end of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs.append((epoch, dict(logs), [v.numpy() for v in self.model.weights]))


def trains(
    lengths: list[int],
    data_kind: str = "arrays",
    model_kind: str = "sequential",
    epochs: int = 3,
    tau: int = 3,
    validates: bool = False,
    fits: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Train with lengths[rank] batches in each epoch."""
    model = compiled(model_kind, tau, **options)
    history = []
    extra = {"validation_data": data(2 + hvd.rank(), 8), "validation_batch_size": BATCH} if validates else {}
    seen = Seen()
    with Log() as lines:
        for _ in range(fits):
            arguments = source(data_kind, lengths[hvd.rank()])
            found = model.fit(**arguments, epochs=epochs, verbose=0, callbacks=[seen, SlowMoCallback()], **extra)
            history.append(found.history)
    with model.optimizer.averaged_parameters():  # all have left together, so none is missing
        pass
    return {**held(model), "history": history, "seen": seen.epochs, "log": lines}


def decides(folder: str) -> dict[str, Any]:
    """Train with Keras' callbacks that decide by metrics, on workers whose local metrics differ."""
    model = compiled(rate=0.05)
    stops = keras.callbacks.EarlyStopping(patience=2, min_delta=0.5, restore_best_weights=True)
    plateau = keras.callbacks.ReduceLROnPlateau(patience=1, factor=0.5, min_delta=0.5)
    seen = Seen()
    mine: list[Any] = [stops, plateau, seen]
    if hvd.rank() == 0:
        mine.append(keras.callbacks.ModelCheckpoint(f"{folder}/best.weights.h5", save_weights_only=True))
        mine.append(keras.callbacks.CSVLogger(f"{folder}/log.csv"))
    history = model.fit(
        **source("arrays", 5 + hvd.rank()),
        epochs=9,
        verbose=0,
        validation_data=data(3 + hvd.rank(), 8),
        callbacks=[*mine, SlowMoCallback()],
    )
    return {
        **held(model),
        "history": history.history,
        "stopped": stops.stopped_epoch,
        "best": stops.best_epoch,
        "seen": seen.epochs,
    }


def schedules() -> dict[str, Any]:
    model = compiled(tau=4)
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.01 / (1 + epoch))
    history = model.fit(**source("arrays", 3), epochs=3, verbose=0, callbacks=[schedule, SlowMoCallback()])
    return {**held(model), "history": history.history}


class Breaks(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 2:
            raise RuntimeError("the power is gone")


def resumes(folder: str, stop: bool, everyone: bool = True) -> dict[str, Any]:
    """Train four epochs of five steps in blocks of twelve; stop in the third and resume, or do not."""

    def fit(*others: Any) -> keras.Model:
        model = compiled(tau=12)
        saves: list[Any] = []
        if everyone or hvd.rank() == 0:
            saves.append(keras.callbacks.BackupAndRestore(f"{folder}/{hvd.rank()}"))
        model.fit(**source("arrays", 5), epochs=4, verbose=0, callbacks=[*saves, SlowMoCallback(), *others])
        return model

    if stop:
        with pytest.raises(RuntimeError, match="the power is gone"):
            fit(Breaks())
    with Log() as lines:
        return {**held(fit()), "log": lines}


def leaves(epochs: list[int], own: bool = False) -> dict[str, Any]:
    """Train epochs[rank] epochs, or stop there by a custom callback."""
    model = compiled()
    seen = Seen()
    extra: list[Any] = []
    count = epochs[hvd.rank()]
    if own and count < max(epochs):
        # No metric ever improves by so much, so training stops after `patience` more epochs.
        extra.append(keras.callbacks.EarlyStopping("loss", min_delta=1e9, patience=count - 1))
        count = max(epochs)
    with Log() as lines:
        model.fit(
            **source("arrays", 4 + hvd.rank()), epochs=count, verbose=0, callbacks=[SlowMoCallback(), seen, *extra]
        )
    return {**held(model), "epochs": len(seen.epochs), "log": lines}


class Fails(keras.callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 4:
            raise ArithmeticError("a callback's own")


def fails() -> str:
    """Raise an error in a callback of rank 1."""
    model = compiled()
    extra = [Fails()] if hvd.rank() == 1 else []
    model.fit(**source("arrays", 20), epochs=2, verbose=0, callbacks=[SlowMoCallback(), *extra])
    return "nothing was raised"


def refused(kind: str) -> str:
    """Return the error that fit raises on this worker."""
    odd = hvd.rank() == 1
    model = compiled("unbuilt" if kind == "unbuilt, Horovod's callback" else "sequential")
    arguments = source("dataset", 5)
    if kind == "nan" and odd:
        x, y = data(5)
        x[9] = np.nan
        arguments = {"x": x, "y": y, "batch_size": BATCH, "shuffle": False}
    if kind == "tau" and odd:
        model.compile(SlowMo(keras.optimizers.SGD(0.01, momentum=0.5), SlowMoConfig(tau=5)), "mse")
    try:
        callbacks = [] if kind == "no callback" else [SlowMoCallback()]
        if kind.endswith("Horovod's callback") and odd:
            callbacks.insert(0, LearningRateWarmupCallback(0.1))
        model.fit(**arguments, epochs=2, verbose=0, callbacks=callbacks)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def recovers(kind: str) -> dict[str, Any]:
    """Train without a callback, which is refused, and then with one."""
    model = compiled(kind)
    with pytest.raises(ValueError, match="Give fit"):
        model.fit(**source("arrays", 3), verbose=0)
    model.fit(**source("arrays", 3), verbose=0, callbacks=[SlowMoCallback()])
    return held(model)


def warns() -> list[str]:
    """Train with different rates; return the log."""
    model = compiled(rate=0.01 * (1 + hvd.rank()))
    model.optimizer.learning_rate = 0.01
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.01 * (1 + hvd.rank()))
    with Log() as lines:
        model.fit(**source("arrays", 6), epochs=2, verbose=0, callbacks=[SlowMoCallback(), schedule])
    return lines


def still() -> dict[str, Any]:
    """Train at rate 0, where the metrics have known values."""
    model = compiled(rate=0.0, metrics=["mae"])
    model.layers[1].trainable = False
    model.compile(model.optimizer, "mse", metrics=["mae"])
    x, y = data(2 + 3 * hvd.rank())
    options = {"validation_data": data(4 - hvd.rank(), 8), "validation_batch_size": BATCH}
    arguments = {"x": x, "y": y, "batch_size": BATCH, "shuffle": False}
    history = model.fit(**arguments, epochs=1, verbose=0, callbacks=[SlowMoCallback()], **options)
    errors = {"": y - model.predict(x, verbose=0)}
    errors["val_"] = options["validation_data"][1] - model.predict(options["validation_data"][0], verbose=0)
    return {"history": history.history, "errors": errors}
