"""The contract of keras.optimizers: every setting that Keras' optimizers share, schedules and callbacks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.tf import SlowMo, SlowMoConfig
from support.models.keras import bare, batch, fit, held, loop, net, same
from support.models.keras_optimizers import SGD, Adam, applied, decay

# Keras turns bfloat16 and h5 files into NumPy in a way that NumPy 2 warns of, whatever the optimizer.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


SETTINGS = {
    "schedule": {"learning_rate": decay},
    "callable": {"learning_rate": lambda: lambda: 0.1},
    "clipnorm": {"clipnorm": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.05},
    "weight_decay": {"weight_decay": 0.1},
    "ema": {"use_ema": True, "ema_momentum": 0.75},
    "ema_overwrite": {"use_ema": True, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 3, "clipnorm": 0.1, "learning_rate": decay},
    "accumulation_ema": {"gradient_accumulation_steps": 2, "use_ema": True, "ema_overwrite_frequency": 2},
    "loss_scale_factor": {"loss_scale_factor": 128.0},
}


def with_settings(name, kind=Adam):
    settings = {"learning_rate": 0.1, **SETTINGS[name]}
    rate = settings["learning_rate"]
    return kind(**{**settings, "learning_rate": rate() if callable(rate) else rate})


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.slow
@pytest.mark.sample("ema_overwrite", "accumulation")
def test_every_setting_is_the_bare_optimizers_to_the_bit(name):
    assert same(applied(bare(with_settings(name)), 8), applied(with_settings(name), 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name in ("schedule", "ema_overwrite", "accumulation", "accumulation_ema")
        for how in ("fit", "several steps per execution", "eager fit")
    ],
)
@pytest.mark.sample("ema_overwrite-several steps per execution")
def test_every_way_of_fit_is_the_bare_optimizers_to_the_bit(name, how):
    ours, theirs = net(), net()
    compiled = {"several steps per execution": {"steps_per_execution": 3}, "eager fit": {"run_eagerly": True}}
    for model, optimizer in ((ours, bare(with_settings(name, SGD))), (theirs, with_settings(name, SGD))):
        fit(model, optimizer, range(7), epochs=2, compiled=compiled.get(how))
    assert same(held(ours), held(theirs))
    assert int(ours.optimizer.iterations) == int(theirs.optimizer.iterations)


def generator(batches):
    signature = (tf.TensorSpec((4, 4)), tf.TensorSpec((4, 2)))
    return tf.data.Dataset.from_generator(lambda: (batch(0, k) for k in range(batches)), output_signature=signature)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_the_last_call_of_a_dataset_of_unknown_length_counts_no_step():
    model = net()
    model.compile(SlowMo(SGD(0.1), SlowMoConfig(tau=2)), "mse")
    model.fit(generator(5), epochs=3, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) == 15
    assert model.optimizer.steps == 15


@pytest.mark.slow
def test_exclude_from_weight_decay():
    def trained(wrap):
        model = net()
        optimizer = wrap(SGD(0.1, weight_decay=0.5))
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return loop(model, optimizer, range(3))

    assert same(trained(bare), trained(lambda inner: inner))


@pytest.mark.slow
@pytest.mark.thorough
def test_the_moving_average_is_the_final_value():
    ours, theirs = net(), net()
    for model, optimizer in (
        (ours, bare(Adam(0.1, use_ema=True, ema_momentum=0.5))),
        (theirs, Adam(0.1, use_ema=True, ema_momentum=0.5)),
    ):
        fit(model, optimizer, range(3))  # which ends in finalize_variable_values
    assert same(held(ours), held(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MaxNorm", "NonNeg", "UnitNorm"])
@pytest.mark.sample("MaxNorm")
def test_variable_constraints(kind):
    def trained(optimizer):
        return loop(net(kernel_constraint=getattr(keras.constraints, kind)()), optimizer, range(4))

    assert same(trained(bare(SGD(0.3))), trained(SGD(0.3)))
    for weights in trained(SlowMo(SGD(0.3), SlowMoConfig(tau=2, beta=0.9))):
        for kernel in weights[::2]:
            norms = np.linalg.norm(kernel, axis=0)
            assert {"MaxNorm": (norms < 2.0001).all(), "NonNeg": (kernel >= 0).all()}.get(
                kind, np.allclose(norms, 1, atol=1e-5)
            )


@pytest.mark.slow
def test_the_rate_is_whatever_callbacks_assign():
    def scheduled(optimizer, callback):
        model = net()
        fit(model, optimizer, range(4), epochs=4, callbacks=[callback()])
        return held(model), float(model.optimizer.learning_rate)

    for callback in (
        lambda: keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (1 + epoch)),
        lambda: keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=0, min_delta=10.0, factor=0.5),
    ):
        mine, other = scheduled(bare(SGD(0.1)), callback), scheduled(SGD(0.1), callback)
        assert mine[1] == other[1] < 0.1
        assert same(mine[0], other[0])


@pytest.mark.slow
def test_a_schedule_counts_slowmos_iterations_though_a_reset_starts_the_inner_ones_anew():
    model, optimizer = net(), SlowMo(Adam(decay()), SlowMoConfig(tau=2, inner_state="reset"))
    loop(model, optimizer, range(5))
    assert int(optimizer.iterations) == 5
    assert int(optimizer.inner_optimizer.iterations) == 1
    assert float(optimizer.learning_rate) == pytest.approx(0.1 * 0.5**2.5)
    assert float(optimizer.inner_optimizer.learning_rate) == pytest.approx(0.1 * 0.5**2)
