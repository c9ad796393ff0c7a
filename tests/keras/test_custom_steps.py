"""SlowMoCallback with models that have a train_step and optimizers of their own, as keras.io's GANs and VAEs."""

import keras
import numpy as np
import pytest

from hvd_slowmo.tf import SlowMo, SlowMoCallback, SlowMoConfig
from hvd_slowmo_tf.fit.model_parts import find_optimizers, split_model

layers = keras.layers


def slowmo(name="slowmo"):
    return SlowMo(keras.optimizers.SGD(0.1), SlowMoConfig(tau=2), name=name)


def two_networks():
    first = keras.Sequential(
        [keras.Input((2,)), layers.Dense(2), layers.BatchNormalization(center=False, scale=False)], name="first"
    )
    second = keras.Sequential([keras.Input((2,)), layers.Dense(2), layers.BatchNormalization()], name="second")
    return keras.Sequential([keras.Input((2,)), first, layers.BatchNormalization(trainable=False), second])


def test_optimizers_are_found_among_attributes_lists_and_dicts_each_once():
    model = two_networks()
    a, b, c = slowmo("a"), slowmo("b"), slowmo("c")
    model.compile(a, "mse")
    model.first_optimizer, model.others = a, {"b": b, "n": 3}
    model.more = [c, keras.optimizers.SGD(0.1)]
    assert find_optimizers(model) == [a, b, c]
    assert find_optimizers(model, [c]) == [c]


def test_another_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"SlowMoCallback takes SlowMo optimizers\. Received: SGD"):
        SlowMoCallback(keras.optimizers.SGD(0.1))


def test_each_statistic_is_averaged_once_by_the_optimizer_around_it():
    model = two_networks()
    first, frozen, second = model.layers
    a, b = slowmo("a"), slowmo("b")
    a.build(second.trainable_variables)
    b.build(first.trainable_variables)
    parts = split_model(model, [a, b])
    assert parts[0].statistics == second.layers[1].non_trainable_variables
    assert parts[1].statistics == first.layers[1].non_trainable_variables  # its layer trains nothing itself
    everything = [v.path for part in parts for v in part.variables]
    assert sorted(everything) == sorted(v.path for v in model.variables)
    assert {v.path for v in frozen.variables} <= {v.path for v in parts[0].variables}


def test_a_variable_of_two_optimizers_is_refused():
    model = two_networks()
    a, b = slowmo("a"), slowmo("b")
    a.build(model.trainable_variables)
    with pytest.raises(ValueError, match=r"b has no variables.*optimizer\.build\(variables\)"):
        split_model(model, [a, b])
    b.build(model.layers[0].trainable_variables)
    with pytest.raises(ValueError, match="kernel is trained by both a and b, which would average it twice"):
        split_model(model, [a, b])


@pytest.mark.workers
@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.sample("True")
def test_two_workers_train_a_gan_and_a_vae(given, keras_workers):
    """The callback finds the optimizers and builds the models, or is given both."""
    first, second = keras_workers(2).run("support.jobs.keras_custom_steps:both", given=given)
    for shape, steps in (("adversaries", [10, 10]), ("autoencoder", 10)):
        a, b = first[shape], second[shape]
        assert len(a["weights"]) == len(b["weights"]) > 0
        assert all(np.array_equal(x, y) for x, y in zip(a["weights"], b["weights"], strict=True)), shape
        assert a["steps"] == b["steps"] == steps
        assert a["history"] == b["history"]
    a, b = first["adversaries"], second["adversaries"]
    assert a["trained"] == a["expected"]
    assert a["statistics"] == [[], ["moving_mean", "moving_variance"]]
    assert a["traces"] == [1, 1]  # the step; none of the join, and none of the trace that only builds
    assert a["own"] != b["own"]
    for key in ("d_loss", "g_loss"):
        assert a["history"][key][-1] == pytest.approx((3 * a["own"][key] + 5 * b["own"][key]) / 8, rel=1e-5)
    assert not [line for line in a["log"] if "WARNING" in line]
    # Means over 2 and 5 batches, of a metric that is logged under another name and of a bare number.
    a, b = first["autoencoder"], second["autoencoder"]
    for key in ("loss", "last"):
        assert a["history"][key][-1] == pytest.approx((2 * a["own"][key] + 5 * b["own"][key]) / 7, rel=1e-5)
    assert [line for line in a["log"] if "WARNING: last: no metric of Keras" in line]
