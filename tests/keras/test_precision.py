"""The contract of keras.optimizers: half precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.tf import SlowMo, SlowMoConfig
from support.models.keras import bare, fit, held, loop, net, same
from support.models.keras_optimizers import SGD, Scaled, decay

# Keras turns bfloat16 and h5 files into NumPy in a way that NumPy 2 warns of, whatever the optimizer.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.fixture
def half():
    """mixed_float16 while models are made and compiled."""
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    yield
    keras.mixed_precision.set_dtype_policy("float32")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [{"auto_scale_loss": False}, {}], ids=["not scaled by compile", "default"])
@pytest.mark.sample("default")
def test_mixed_float16_with_the_scaler_within(half, compiled):
    """Also with the schedule that the innermost optimizer has brought along. compile() adds no second scaler."""
    ours, theirs = net(), net()
    fit(theirs, Scaled(SGD(decay(), momentum=0.5)), range(5), compiled={"auto_scale_loss": False})
    fit(ours, bare(Scaled(SGD(decay(), momentum=0.5))), range(5), compiled=compiled)
    assert type(ours.optimizer).__mro__[1] is SlowMo
    assert same(held(ours), held(theirs))
    assert int(ours.optimizer.iterations) == 5
    assert float(ours.optimizer.learning_rate) == pytest.approx(0.1 * 0.5**2.5)


@pytest.mark.slow
def test_the_rate_of_a_scaled_optimizer_is_slowmos():
    optimizer = bare(Scaled(SGD(0.1)))
    variables = [keras.Variable(np.ones(3, "float32"))]
    optimizer.build(variables)
    optimizer.learning_rate = 0.5
    optimizer.apply([tf.constant([2.0**15] * 3)], variables)
    np.testing.assert_array_equal(variables[0].numpy(), 0.5)
    assert int(optimizer.iterations) == 1


@pytest.mark.slow
def test_tfa_2351_the_first_anchor_is_right_though_the_scaler_skips_the_first_step():
    optimizer = SlowMo(Scaled(SGD(0.5)), SlowMoConfig.lookahead(2))
    v = keras.Variable(np.full(3, 8.0, "float32"))
    for gradient in (np.inf, 2.0**14):  # after an overflow the scale is half of 2**15
        optimizer.apply([tf.constant([gradient] * 3, tf.float32)], [v])
    assert (optimizer.steps, int(optimizer.iterations)) == (2, 2)
    np.testing.assert_array_equal(v.numpy(), 7.75)  # half the way from 8 to 7.5


@pytest.mark.parametrize("how", ["compile", "by hand"])
def test_a_scaler_around_slowmo_raises_at_once(half, how):
    with pytest.raises(ValueError, match=r"SlowMo\(keras.optimizers.LossScaleOptimizer\(inner_optimizer\), config\)"):
        net().compile(bare(SGD(0.1)), "mse") if how == "compile" else Scaled(bare(SGD(0.1)))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
@pytest.mark.sample("mixed_bfloat16")
def test_bfloat16(policy):
    keras.mixed_precision.set_dtype_policy(policy)
    try:
        ours, theirs, slow = net(), net(), net()
        expected = loop(theirs, SGD(0.1), range(3))
        assert same(loop(ours, bare(SGD(0.1)), range(3)), expected)
        optimizer = SlowMo(SGD(0.1), SlowMoConfig(tau=2))
        loop(slow, optimizer, range(4))
        vectors = optimizer.worker.variables.vectors
        assert {v.dtype for parts in vectors.values() for v in parts.values()} == {"float32"}
        flat = np.concatenate([v.reshape(-1).astype("float32") for v in held(slow)])
        anchor = tf.cast(vectors["anchor"][0].value, slow.weights[0].dtype)
        np.testing.assert_array_equal(tf.cast(anchor, tf.float32).numpy(), flat)
    finally:
        keras.mixed_precision.set_dtype_policy("float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.sample("bfloat16")
def test_rounding_of_the_write_never_enters_the_momentum(dtype):
    """Without gradients Delta is 0: v must decay by beta and nothing else, though every write of the model rounds."""
    v = keras.Variable(np.zeros(64), dtype=dtype)
    optimizer = SlowMo(SGD(1.0), SlowMoConfig(tau=1, beta=0.9))
    optimizer.apply([tf.cast(tf.linspace(0.1, 0.3, 64), dtype)], [v])
    vectors = optimizer.worker.variables.vectors
    momentum, anchor = vectors["v"][0].numpy(), vectors["anchor"][0].numpy()
    for _ in range(50):
        optimizer.apply([tf.zeros(64, dtype)], [v])
        momentum = momentum * np.float32(0.9)
        anchor = anchor - momentum
        np.testing.assert_array_equal(v.numpy(), vectors["anchor"][0].numpy().astype(v.numpy().dtype))
    np.testing.assert_allclose(vectors["v"][0].numpy(), momentum, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(vectors["anchor"][0].numpy(), anchor, rtol=0, atol=1e-5)
