"""`slowmo.measure` of Keras: steps of `fit` and of custom loops, with and without an exchange, and refusals."""

import keras
import numpy as np
import pytest

import hvd_slowmo.tf as slowmo
from hvd_slowmo.advice.training import Training, load_training
from hvd_slowmo.comm.threads import ThreadWorld
from support.models.keras import net, step_of
from support.own_time import OwnTime
from support.trainings.keras import GraphComm

STEP, EXCHANGE = 0.25, 1.5  # seconds of a step, and of an exchange
X, Y = np.ones((32, 4), np.float32), np.ones((32, 2), np.float32)


@pytest.fixture
def clock(monkeypatch):
    own = OwnTime()
    monkeypatch.setattr("hvd_slowmo.advice.steps.time", own)
    return own


class Takes(keras.callbacks.Callback):
    """Lets a step take its time, and whatever lies between two epochs much longer."""

    def __init__(self, clock, steps=1):
        super().__init__()
        self.clock, self.steps = clock, steps

    def on_train_batch_begin(self, batch, logs=None):
        self.clock.pass_by(self.steps * STEP, work=self.steps * 0.125)

    def on_epoch_end(self, epoch, logs=None):
        self.clock.pass_by(100)


def compiled(optimizer, **options):
    model = net()
    model.layers[0].bias.trainable = False
    model.compile(optimizer, "mse", **options)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD(0.1), slowmo.SlowMo("sgd", tau=2)], ids=["inner", "SlowMo"])
def test_a_fit_is_measured(clock, tmp_path, optimizer):
    model = compiled(optimizer)
    measured = slowmo.measure(model.optimizer, steps=10)
    callbacks = [measured, Takes(clock), *([slowmo.SlowMoCallback()] if isinstance(optimizer, slowmo.SlowMo) else [])]
    model.fit(X, Y, batch_size=8, epochs=3, verbose=0, callbacks=callbacks)
    assert measured.done
    parameters = 4 * 3 + 3 * 2 + 2
    assert measured.training() == Training(STEP, parameters, 4 * parameters, 0.125, STEP / 2, steps=10)
    measured.save(tmp_path / "step.json")
    assert load_training(tmp_path / "step.json") == measured.training()


@pytest.mark.slow
def test_steps_of_one_call_share_its_time(clock):
    model = compiled("sgd", steps_per_execution=4)
    measured = slowmo.measure(model.optimizer, steps=12)
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=[measured, Takes(clock, steps=4)])
    found = measured.training()
    assert (found.seconds, found.work, found.steps) == (STEP, 0.125, 12)


@pytest.mark.slow
def test_accumulated_gradients_are_one_step(clock):
    model = compiled(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    measured = slowmo.measure(model.optimizer, steps=3)
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[measured, Takes(clock)])
    assert (measured.training().seconds, measured.training().steps) == (2 * STEP, 3)


@pytest.mark.slow
def test_steps_with_an_exchange_count_apart(clock):
    def work(comm):
        model = net()
        optimizer = slowmo.SlowMo(keras.optimizers.SGD(0.1), tau=3, comm=GraphComm(comm))
        optimizer.broadcast(model)
        step, measured = step_of(model, optimizer), slowmo.measure(optimizer, steps=12)
        with pytest.raises(RuntimeError, match=r"no step without an exchange .* Received: 0 steps so far"):
            measured.training()
        while not measured.done:
            clock.pass_by(STEP + EXCHANGE * (optimizer.steps % 3 == 2))
            step(X[:8], Y[:8])
            measured.step_ended()
        return measured.training()

    for found in ThreadWorld(2).run(work):
        assert (found.steps, found.seconds, found.exchange) == (12, STEP, EXCHANGE)


def test_an_optimizer_that_always_exchanges_is_refused():
    def work(comm):
        optimizer = slowmo.SlowMo(keras.optimizers.SGD(0.1), slowmo.SlowMoConfig.ar_sgd(), comm=GraphComm(comm))
        with pytest.raises(ValueError, match="every step of this optimizer exchanges something"):
            slowmo.measure(optimizer)
        assert not slowmo.measure(optimizer.inner_optimizer).done

    ThreadWorld(2).run(work)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match=r"must be a Keras optimizer\. Received: str"):
        slowmo.measure("sgd")
    with pytest.raises(ValueError, match=r"`steps` must be a positive integer\. Received: steps=0"):
        slowmo.measure(keras.optimizers.SGD(0.1), steps=0)
