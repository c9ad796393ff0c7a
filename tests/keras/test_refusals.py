"""The contract of keras.optimizers: what is refused."""

import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.tf import SlowMo, SlowMoConfig
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
def test_keras_on_another_backend_is_a_clear_error():
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", "import hvd_slowmo.tf"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ImportError: hvd_slowmo.tf needs Keras on TensorFlow, and Keras runs on 'torch' here" in done.stderr
