"""The contract of keras.optimizers: what is refused."""

import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.tf import ParameterMap, SlowMo, SlowMoCallback, SlowMoConfig
from hvd_slowmo_tf.traces.failed_traces import initialize, without_values
from support.models.keras import bare
from support.models.keras_optimizers import SGD, Scaled

# Keras turns bfloat16 and h5 files into NumPy in a way that NumPy 2 warns of, whatever the optimizer.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def test_wrong_arguments():
    config = SlowMoConfig()
    multi = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(default_optimizer=SGD(0.1)))
    free = keras.optimizers.ScheduleFreeAdamW
    for error, words_, make in (
        (TypeError, "Optimizer, or its name or config. Received: int", lambda: SlowMo(3, config)),
        (ValueError, "sdg", lambda: SlowMo("sdg", config)),
        (TypeError, "`config` must be a SlowMoConfig. Received: dict", lambda: SlowMo(SGD(0.1), {})),
        (TypeError, "`name` must be a string", lambda: SlowMo(SGD(0.1), config, name=3)),
        (ValueError, "`name` may have letters", lambda: SlowMo(SGD(0.1), config, name="a/b")),
        (TypeError, "is a SlowMo optimizer already", lambda: bare(bare(SGD(0.1)))),
        (TypeError, "is a MultiOptimizer, which has a learning rate for each", lambda: bare(multi)),
        (TypeError, "is a MultiOptimizer", lambda: bare(Scaled(multi))),
        (ValueError, "Use inner_state='average'", lambda: SlowMo(free(0.1), SlowMoConfig(inner_state="reset"))),
        (ValueError, "Use inner_state='average'", lambda: SlowMo(free(0.1), SlowMoConfig(nonfinite="exclude"))),
        (ValueError, "give no process_set", lambda: SlowMo(SGD(0.1), SlowMoConfig(gradients="node"), process_set=1)),
    ):
        with pytest.raises(error, match=re.escape(words_)):
            make()


def test_an_optimizer_that_has_been_used_with_what_moves_is_refused():
    used = SGD(0.1, use_ema=True)
    used.build([keras.Variable(np.ones(2))])
    with pytest.raises(ValueError, match="Wrap it before it is built"):
        bare(used)


def test_a_strategy_is_refused():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope(), pytest.raises(ValueError, match=r"MirroredStrategy\. Start several workers with horovodrun"):
        bare(SGD(0.1))
    with strategy.scope():
        v = keras.Variable(np.ones(2, "float32"))
    optimizer = bare(SGD(0.1))
    with pytest.raises(ValueError, match=r"not under a tf\.distribute strategy"):
        strategy.run(lambda: optimizer.apply([tf.ones(2)], [v]))


def test_constraints_are_refused_beside_pytorch_workers():
    """These would not apply them, and all would differ after every outer step."""
    layer = keras.layers.Dense(2, kernel_constraint=keras.constraints.MaxNorm(0.5))
    model = keras.Sequential([keras.Input((3,)), layer])
    optimizer = SlowMo(SGD(0.1), SlowMoConfig(tau=2), parameter_map=ParameterMap(), comm=SoloComm())
    with pytest.raises(ValueError, match=r"kernel has MaxNorm\. Take constraints off, or use Keras workers alone"):
        optimizer.broadcast(model)


class Two(SoloComm):
    """One of two workers, which never starts."""

    size, ranks = 2, (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("built", [True, False])
def test_training_without_a_start_is_refused_again_and_again(built):
    """TensorFlow keeps a trace that has failed after it has made variables, and does nothing from then on."""
    inside = [keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([*([keras.Input((4,))] if built else []), *inside])
    optimizer = SlowMo(SGD(0.1), SlowMoConfig(tau=2), comm=Two())
    model.compile(optimizer, "mse", metrics=["mae"])
    x = np.ones((8, 4), "float32")
    for train in (model.fit, model.train_on_batch, model.train_on_batch, model.fit):
        with pytest.raises(ValueError, match=r"2 workers, and they have not been brought to one start\. Give fit"):
            train(x, x[:, :1])
        assert not optimizer.built
    assert bool(without_values(model.variables)) is not built
    initialize(model)
    assert not without_values(model.variables)
    assert model.layers[0].kernel.numpy().any()
    assert model.layers[1].moving_variance.numpy().tolist() == [1.0] * 3


def test_variables_without_values_are_refused_at_the_start():
    made = []

    @tf.function(autograph=False)
    def fails():
        made.append(keras.Variable(np.ones(2, "float32"), name="made"))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fails()
    with pytest.raises(ValueError, match=r"1 variables have no values, the first is made: .* Make the model anew"):
        bare(SGD(0.1)).broadcast(made)


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.sample("True")
def test_keras_swaps_in_the_moving_average_for_validation(scaled):
    def trained(wrap):
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        inner = SGD(0.05, use_ema=True, ema_momentum=0.9)
        optimizer = Scaled(inner) if scaled else inner
        model.compile(bare(optimizer) if wrap else optimizer, "mse")
        x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
        swap = keras.callbacks.SwapEMAWeights()
        callbacks = [swap, SlowMoCallback()] if wrap else [swap]
        data = {"x": x, "y": x[:, :1], "validation_data": (x, x[:, :1])}
        history = model.fit(**data, epochs=2, verbose=0, shuffle=False, callbacks=callbacks).history
        return history["val_loss"], [v.numpy() for v in model.weights]

    (losses, weights), (expected, others) = trained(wrap=True), trained(wrap=False)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert all(np.allclose(a, b, rtol=1e-5) for a, b in zip(weights, others, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parameter", "rate"])
def test_what_is_not_finite_raises_and_nothing_is_written(kind):
    v = keras.Variable(np.ones(2, "float32"))
    optimizer = SlowMo(SGD(0.1), SlowMoConfig(tau=2))
    optimizer.apply([tf.ones(2)], [v])
    anchor = optimizer.worker.variables.vectors["anchor"][0].numpy()
    if kind == "rate":
        optimizer.learning_rate = float("nan")
        optimizer.inner_optimizer.update_step = lambda *given: None
    with pytest.raises(ValueError, match=r"not finite|not a finite number"):
        optimizer.apply([tf.constant([1.0, np.nan])], [v])
    np.testing.assert_array_equal(optimizer.worker.variables.vectors["anchor"][0].numpy(), anchor)
    assert optimizer.steps == 1


@pytest.mark.slow
@pytest.mark.thorough
def test_keras_on_another_backend_is_a_clear_error():
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", "import hvd_slowmo.tf"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ImportError: hvd_slowmo.tf needs Keras on TensorFlow, and Keras runs on 'torch' here" in done.stderr
