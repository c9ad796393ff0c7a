"""The contract of keras.optimizers: kinds of models."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.tf import SlowMo, SlowMoConfig
from support.models.keras import bare, batch, fill, fit, held, layers, net, same, sentences, with_statistics, words
from support.models.keras_optimizers import SGD, Adam

# Keras turns bfloat16 and h5 files into NumPy in a way that NumPy 2 warns of, whatever the optimizer.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def shared():
    layer = layers.Dense(4, activation="tanh")
    entry = keras.Input((4,))
    return fill(keras.Model(entry, layers.Dense(2)(layer(layer(entry)))))


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.a = layers.Dense(3, kernel_initializer="ones")
        self.b = layers.Dense(2, kernel_initializer="ones")
        self.drop = layers.Dropout(0.5, seed=1)

    def call(self, x, training=False):
        return self.b(self.drop(self.a(x), training=training))


def spectral():
    model = fill(keras.Sequential([keras.Input((4,)), layers.SpectralNormalization(layers.Dense(3)), layers.Dense(2)]))
    model.layers[0].vector_u.assign([[1, 2, 3]])
    return model


MODELS = {"shared": (shared, batch), "subclassed": (Own, batch), "statistics": (with_statistics, batch)}
MODELS["spectral"] = (spectral, batch)
MODELS["embedding"] = (words, sentences)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.slow
def test_the_vector_of_spectral_normalization_stays_a_workers_own(listed):
    model = spectral()
    vector = model.layers[0].vector_u
    optimizer = SlowMo(SGD(0.1), SlowMoConfig(tau=2))
    optimizer.broadcast(model.variables if listed else model)
    fit(model, optimizer, range(3))
    optimizer.join(model)
    assert np.linalg.norm(vector.numpy()) == pytest.approx(1)
    assert [ref.variable.name for ref in optimizer.worker.step.assembly.layout.refs_of("statistic")] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.sample("embedding")
def test_every_kind_of_model_trains_as_with_the_bare_optimizer(kind):
    make, data = MODELS[kind]
    ours, theirs = make(), make()
    fit(theirs, SGD(0.1), range(3), data=data)
    fit(ours, bare(SGD(0.1)), range(3), data=data)
    for a, b in zip(held(ours), held(theirs), strict=True):  # TensorFlow rewrites BatchNorm's gradient
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_layers_frozen_and_unfrozen_between_two_fits():
    def trained(wrap):
        model = net()
        model.layers[0].trainable = False
        fit(model, wrap(SGD(0.1)), range(2))
        first = held(model)
        model.layers[0].trainable = True
        fit(model, wrap(SGD(0.1)), range(2))
        return [first, held(model)]

    assert same(trained(bare), trained(lambda inner: inner))


@pytest.mark.slow
def test_a_layer_unfrozen_without_a_new_compile_is_refused():
    model = net()
    model.layers[0].trainable = False
    fit(model, SlowMo(SGD(0.1), SlowMoConfig(tau=2)), range(2))
    model.layers[0].trainable = True
    with pytest.raises(ValueError, match="Unknown variable"):
        model.train_function = None or model.fit(*batch(0, 0), verbose=0)


@pytest.mark.slow
def test_a_second_fit_goes_on_in_the_block_of_the_first():
    once, twice = net(), net()
    config = SlowMoConfig(tau=4)
    fit(once, SlowMo(SGD(0.1), config), range(3), epochs=4)
    optimizer = SlowMo(SGD(0.1), config)
    fit(twice, optimizer, range(3), epochs=2)
    x, y = (np.concatenate(parts) for parts in zip(*(batch(0, k) for k in range(3)), strict=True))
    twice.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    assert same(held(once), held(twice))
    assert optimizer.worker.step.traces == 1


@pytest.mark.slow
@pytest.mark.thorough
def test_two_optimizers_in_one_loop():
    def adversaries(wrap):
        maker, judge = net(), net(1)
        mine, other = wrap(SGD(0.1), "maker"), wrap(Adam(0.1), "judge")

        @tf.function(autograph=False)
        def step(x, y):
            with tf.GradientTape(persistent=True) as tape:
                made = tf.reduce_mean(tf.square(maker(x) - y))
                judged = tf.reduce_mean(tf.square(judge(x) - maker(x)))
            mine.apply_gradients(
                zip(tape.gradient(made, maker.trainable_variables), maker.trainable_variables, strict=True)
            )
            other.apply(tape.gradient(judged, judge.trainable_variables), judge.trainable_variables)

        for k in range(4):
            step(*map(tf.constant, batch(0, k)))
        return held(maker) + held(judge)

    assert same(adversaries(lambda inner, name: bare(inner, name=name)), adversaries(lambda inner, name: inner))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
def test_a_variable_without_a_gradient_stays_as_it_is():
    a, b = (keras.Variable(np.ones(2, "float32"), name=name) for name in "ab")
    optimizer = SlowMo(SGD(0.5, weight_decay=0.5), SlowMoConfig(tau=2, gradients="all"))
    optimizer.apply([tf.constant([1.0, 1.0]), None], [a, b])
    assert a.numpy().tolist() == [0.25, 0.25]
    assert b.numpy().tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="no gradient for any variable"):
        optimizer.apply([None, None], [a, b])
