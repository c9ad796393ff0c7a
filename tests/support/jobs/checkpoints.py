"""Jobs for Horovod workers of either framework (see ../pool.py): save, resume and refuse checkpoints."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from support.trainings.checkpoints import CASES, KerasWorker, TorchWorker, apart


def worker(framework: str, case: str) -> Any:
    rank = importlib.import_module("hvd_slowmo.torch" if framework == "torch" else "horovod.tensorflow").rank()
    return {"torch": TorchWorker, "tensorflow": KerasWorker}[framework](*CASES[case], rank=rank)


def doubles(framework: str) -> Any:
    if framework == "torch":
        return contextlib.nullcontext()
    from support.trainings import keras as keras_training

    return keras_training.doubles()


def resumed(framework: str, case: str, path: Path, stop: int, end: int) -> tuple[float, list[dict[str, np.ndarray]]]:
    """Stop in the middle; return the resumed run's distance from the uninterrupted one, and the latter's values."""
    with doubles(framework):
        first = worker(framework, case)
        first.advance(range(stop))
        first.save(path)
        whole = first.advance(range(stop, end))
        again = worker(framework, case)
        again.load(path)
        return apart(whole, again.advance(range(stop, end))), whole


def continued(framework: str, case: str, path: Path, stop: int, end: int) -> list[dict[str, np.ndarray]]:
    """Continue a run of the other framework."""
    with doubles(framework):
        other = worker(framework, case)
        other.load(path)
        return other.advance(range(stop, end))


def refused(framework: str, path: Path) -> list[str]:
    """Every rank raises rank 1's error; the workers are still in step then."""
    with doubles(framework):
        one = worker(framework, "reset")
        one.save(path / "before")
        said = []
        for work, name in ((one.save, "after"), (one.load, "before")):
            try:
                work(path / name if one.rank == 0 else path / "nowhere" / name)
            except ValueError as error:
                said.append(str(error))
        one.advance(range(3))
        one.save(path / "checkpoint")
        one.load(path / "checkpoint")
        one.advance(range(3, 6))
        return said


def fitted(path: Path) -> list[bool]:
    """Under `fit`, a callback saves in the middle of a block; the resumed run equals the uninterrupted one."""
    import keras

    from hvd_slowmo.tf import SlowMo, SlowMoCallback, SlowMoConfig
    from support.jobs.keras_fit import data, hvd, network

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.optimizer.save(path / f"{epoch}")

    def compiled() -> Any:
        keras.utils.set_random_seed(hvd.rank())
        model = network()
        model.compile(SlowMo(keras.optimizers.Adam(0.01), SlowMoConfig(tau=3)), "mse")
        return model

    x, y = data(16, hvd.rank())
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    first = compiled()
    first.fit(x, y, epochs=3, callbacks=[SlowMoCallback(), Save()], **options)
    again = compiled()
    again.optimizer.load(path / "0", again)
    again.fit(x, y, epochs=3, initial_epoch=1, callbacks=[SlowMoCallback()], **options)
    return [np.array_equal(a.numpy(), b.numpy()) for a, b in zip(first.weights, again.weights, strict=True)]


def periodic(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the results of a `fit` of uneven workers, and of one that ends after two epochs and is run once more."""
    import keras

    from hvd_slowmo.tf import Checkpoints, SlowMo, SlowMoCallback, SlowMoConfig
    from support.jobs.keras_fit import data, hvd, network

    x, y = data(5 + hvd.rank(), hvd.rank())

    def fit(folder: Path, epochs: int) -> dict[str, Any]:
        keras.utils.set_random_seed(hvd.rank())
        model = network()
        model.compile(SlowMo(keras.optimizers.Adam(0.01), SlowMoConfig(tau=4)), "mse")
        callbacks = [SlowMoCallback(checkpoints=Checkpoints(folder, keep=1))]
        model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
        weights = [v.numpy() for v in model.weights]
        return {"epochs": model.history.epoch, "steps": model.optimizer.steps, "weights": weights}

    whole = fit(path / "whole", 4)
    fit(path / "again", 2)
    return whole, fit(path / "again", 4)


def preempted(path: Path) -> tuple[int, int, list[int]]:
    """Rank 1 gets a signal behind step 6, where tau is 4; return status, steps, and the epochs of the next run."""
    import signal

    import keras

    from hvd_slowmo.tf import Checkpoints, SlowMo, SlowMoCallback, SlowMoConfig, on_preemption
    from support.jobs.keras_fit import data, hvd, network

    class Signal(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if hvd.rank() == 1 and self.model.optimizer.steps == 6:
                signal.raise_signal(signal.SIGTERM)

    def fit(*others: Any) -> Any:
        checkpoints = Checkpoints(path)
        on_preemption(save=checkpoints)
        keras.utils.set_random_seed(hvd.rank())
        model = network()
        model.compile(SlowMo(keras.optimizers.SGD(0.01), SlowMoConfig(tau=4)), "mse")
        callbacks = [SlowMoCallback(checkpoints=checkpoints), *others]
        try:
            model.fit(*data(5), batch_size=4, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
        except SystemExit as ended:
            return ended.code, model.optimizer.steps
        finally:
            on_preemption(save=None)
        return model.history.epoch

    return (*fit(Signal()), fit())
