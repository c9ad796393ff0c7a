"""Checkpoints of the whole job in `fit`: the epoch, saves within and between epochs, several workers."""

import signal

import keras
import numpy as np
import pytest

from hvd_slowmo.tf import PREEMPTED, Checkpoints, SlowMo, SlowMoCallback, SlowMoConfig, on_preemption
from support.models.keras import held, same

X = np.random.default_rng(5).normal(size=(24, 4)).astype(np.float32)
Y = X.sum(axis=1, keepdims=True)


class Interrupted(Exception):
    pass


class Interrupt(keras.callbacks.Callback):
    """Ends the process, as far as a test can, after some batch of some epoch."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.at = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            raise Interrupted


class Halve(keras.callbacks.Callback):
    """Changes the learning rate at the end of an epoch, as ReduceLROnPlateau does."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.optimizer.learning_rate = float(self.model.optimizer.learning_rate.numpy()) / 2


def compiled(built=True):
    keras.utils.set_random_seed(0)
    start = [keras.Input((4,))] if built else []
    model = keras.Sequential([*start, keras.layers.Dense(6), keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    model.compile(SlowMo(keras.optimizers.Adam(0.01), SlowMoConfig(tau=4)), "mse")
    return model


def fit(folder, epochs=3, built=True, every=None, others=()):
    """Run a script's whole command line; six batches an epoch."""
    model, checkpoints = compiled(built), Checkpoints(folder, every=every)
    callbacks = [SlowMoCallback(checkpoints=checkpoints), *others]
    model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("built", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_an_interrupted_fit_goes_on_with_its_epoch_bitwise(built, tmp_path):
    whole = fit(tmp_path / "whole", built=built, others=[Halve()])
    with pytest.raises(Interrupted):
        fit(tmp_path / "again", built=built, others=[Interrupt(2, 3), Halve()])
    again = fit(tmp_path / "again", built=built, others=[Halve()])
    assert again.history.epoch == [2]
    assert again.optimizer.steps == whole.optimizer.steps == 18
    assert same(held(again), held(whole))


@pytest.mark.slow
def test_a_fit_that_is_done_restores_its_model_and_trains_no_more(tmp_path):
    whole = fit(tmp_path)
    again = fit(tmp_path)
    assert again.history.epoch == []
    assert same(held(again), held(whole))
    assert fit(tmp_path, epochs=4).history.epoch == [3]


@pytest.mark.thorough
@pytest.mark.slow
def test_a_save_within_an_epoch_resumes_at_the_begin_of_that_epoch(tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path, every=4, others=[Interrupt(1, 5)])  # after step 12
    steps = sorted(path.name for path in tmp_path.glob("*.slowmo"))
    # Step 8 is the second of epoch 1. Whether step 12's has become whole in time is up to the disk.
    assert steps[:2] == ["step-000000004.slowmo", "step-000000008.slowmo"]
    again = fit(tmp_path, every=4)
    assert again.history.epoch == [1, 2]
    assert again.optimizer.steps in (8 + 12, 12 + 12)


def test_several_optimizers_are_refused(tmp_path):
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.a = SlowMo(keras.optimizers.SGD(0.1), name="a")
            self.b = SlowMo(keras.optimizers.SGD(0.1), name="b")

    model = Two()
    model.compile()
    with pytest.raises(ValueError, match="save the job of one optimizer, and this model has 2 SlowMo optimizers"):
        model.fit(X, Y, verbose=0, callbacks=[SlowMoCallback(checkpoints=Checkpoints(tmp_path))])


def test_checkpoints_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"`checkpoints` must be Checkpoints. Received: str"):
        SlowMoCallback(checkpoints="runs/a")


def test_keras_calls_nothing_after_a_batch_where_nothing_is_saved(tmp_path):
    assert SlowMoCallback().on_train_batch_end._is_default
    assert not hasattr(SlowMoCallback(checkpoints=Checkpoints(tmp_path)).on_train_batch_end, "_is_default")


class Signal(keras.callbacks.Callback):
    """The scheduler announces the end, after some batch of some epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (1, 2):
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def no_handler_left():
    yield
    on_preemption(save=None)


@pytest.mark.slow
def test_a_signal_saves_and_ends_a_fit_which_resumes_in_that_epoch(tmp_path, no_handler_left):
    checkpoints, model = Checkpoints(tmp_path), compiled()
    on_preemption(save=checkpoints)
    callbacks = [SlowMoCallback(checkpoints=checkpoints), Signal()]
    with pytest.raises(SystemExit) as ended:
        model.fit(X, Y, batch_size=4, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
    assert ended.value.code == PREEMPTED
    assert model.optimizer.steps == 10  # the batch that follows the signal is finished
    on_preemption(save=None)
    again = fit(tmp_path)
    assert again.history.epoch == [1, 2]
    assert again.optimizer.steps == 10 + 12


@pytest.mark.slow
def test_a_signal_saves_a_fit_to_a_path(tmp_path, no_handler_left):
    model = compiled()
    on_preemption(save=tmp_path / "last.slowmo")
    with pytest.raises(SystemExit):
        model.fit(X, Y, batch_size=4, epochs=3, shuffle=False, verbose=0, callbacks=[SlowMoCallback(), Signal()])
    other = compiled()
    other.optimizer.load(tmp_path / "last.slowmo", other)
    assert other.optimizer.steps == 10
    assert same(held(other), held(model))


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.thorough
def test_a_signal_to_one_worker_ends_the_fit_of_both_at_an_outer_step(keras_workers, tmp_path):
    first, second = keras_workers(2).run("support.jobs.checkpoints:preempted", path=tmp_path)
    assert first == second == (PREEMPTED, 8, [1, 2])


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.thorough
def test_two_workers_go_on_as_if_nothing_had_been(keras_workers, tmp_path):
    for whole, again in keras_workers(2).run("support.jobs.checkpoints:periodic", path=tmp_path):
        assert again["epochs"] == [2, 3]
        assert again["steps"] == whole["steps"]
        assert all(np.array_equal(a, b) for a, b in zip(whole["weights"], again["weights"], strict=True))
