"""The contract of keras.optimizers: every optimizer. On one worker Local SGD with tau 1 is the bare one to the bit."""

import keras
import numpy as np
import pytest

import hvd_slowmo.tf as slowmo
from support.models.keras import bare, fit, held, loop, net, same
from support.models.keras_optimizers import applied

# Keras turns bfloat16 and h5 files into NumPy in a way that NumPy 2 warns of, whatever the optimizer.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


NOT_WRAPPED_AS_THEY_ARE = {"MultiOptimizer", "LossScaleOptimizer"}  # tests of their own
CLASSES = {
    name: item
    for name, item in sorted(vars(keras.optimizers).items())
    if isinstance(item, type)
    and issubclass(item, keras.optimizers.Optimizer)
    and item is not keras.optimizers.Optimizer
    and name not in NOT_WRAPPED_AS_THEY_ARE
}


def test_no_optimizer_is_forgotten():
    known = {"SGD", "Adam", "AdamW", "Nadam", "Adagrad", "Adadelta", "RMSprop", "Ftrl", "Lion", "Adamax", "Adafactor"}
    assert known <= CLASSES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.sample("SGD", "Adam")
def test_every_optimizer_is_the_bare_one_to_the_bit(name):
    assert same(applied(bare(CLASSES[name](0.01))), applied(CLASSES[name](0.01)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.sample("AdamW")
def test_every_optimizer_is_the_bare_one_to_the_bit_under_fit(name):
    ours, theirs, optimizer = net(), net(), CLASSES[name](0.01)
    optimizer.build(theirs.trainable_variables)
    fit(theirs, optimizer, range(4))
    fit(ours, bare(CLASSES[name](0.01)), range(4))
    assert same(held(ours), held(theirs))


# TensorFlow's graphs turn a quotient by a square root into a product, so these differ by a rounding from themselves.
ROUNDED_OTHERWISE_IN_A_GRAPH = {"Adafactor", "Adagrad", "Ftrl", "Muon", "RMSprop", "ScheduleFreeAdamW"}


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("name", CLASSES)
def test_an_eager_loop_is_the_bare_optimizers(name):
    theirs, optimizer = net(), CLASSES[name](0.01)
    optimizer.build(theirs.trainable_variables)
    expected = loop(theirs, optimizer, range(3), traced=False)
    found = loop(net(), bare(CLASSES[name](0.01)), range(3), traced=False)
    if name not in ROUNDED_OTHERWISE_IN_A_GRAPH:
        assert same(found, expected)
    for mine, other in zip(found, expected, strict=True):
        for a, b in zip(mine, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_steps_can_be_asked_for_while_variables_are_made():
    """By the thread that ends a worker which hangs in an elastic job, at any moment."""
    seen = []

    class Asks(keras.optimizers.SGD):
        def build(self, variables):
            seen.append(outer.steps)
            super().build(variables)

    outer = slowmo.SlowMo(Asks(0.1), tau=2)
    variable = keras.Variable([1.0])
    outer.build([variable])
    outer.apply([variable.value], [variable])
    assert seen == [0]
    assert outer.steps == 1
