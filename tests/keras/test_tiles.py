"""Work on long tensors in a trace, in tiles and by branches: the same values, bitwise, as at once."""

import operator

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.core.parts.codec import Elementwise, NumpyCodec, blocks_in, plain
from hvd_slowmo.core.parts.layout import BLOCK
from hvd_slowmo.core.parts.outer_update import Momentum, outer_update
from hvd_slowmo.tf import SlowMo, SlowMoConfig
from hvd_slowmo_tf.traces import codec, ops, tiles
from support.models.keras import fit, held
from support.trainings.keras_few_bits import trained

# Several workers' graphs wait in this process's threads at once; see test_reference.py.
tf.config.threading.set_inter_op_parallelism_threads(16)

# Whole tiles, and some elements or blocks more.
LENGTHS = [3 * 64, 5 * 64 + 63]
BLOCKS = [6, 11]


def numbers(size, seed):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def loops(function):
    return [op.type for op in function.graph.get_operations() if op.type in ("While", "StatelessWhile")]


def functions_in(function):
    """Return the functions that a traced one calls."""
    calls = [op for op in function.graph.get_operations() if op.type.endswith("PartitionedCall")]
    return [function.graph._get_function(op.get_attr("f").name) for op in calls]


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("momentum", "nesterov"), [(False, False), (True, False), (True, True)])
def test_an_outer_update_in_tiles(length, momentum, nesterov, monkeypatch):
    """As a trace of the core's function has them: TensorFlow multiplies some of its factors first."""
    monkeypatch.setattr(tiles, "TILE", 64)
    config = SlowMoConfig(tau=2, beta=0.5 if momentum else 0.0, alpha=0.75, nesterov=nesterov)
    m = Momentum(*map(tf.constant, (0.4, 0.3, 1.0)))
    vectors = [numbers(length, seed) for seed in range(3 if momentum else 2)]

    @tf.function(autograph=False)
    def update(m, mean, anchor, v=None):
        return tiles.tiled_outer_update(config, mean, anchor, v, m)

    @tf.function(autograph=False)
    def at_once(m, mean, anchor, v=None):
        return outer_update(config, mean, anchor, v, m)

    expected_loops = ["StatelessWhile"] if momentum else []
    assert loops(update.get_concrete_function(m, *map(tf.constant, vectors))) == expected_loops
    found = update(m, *map(tf.constant, vectors))
    expected = at_once(m, *map(tf.constant, vectors))
    assert np.array_equal(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None) == (not momentum)
    if momentum:
        assert np.array_equal(found[1], expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_messages_in_tiles_are_those_of_numpy(bits, blocks, monkeypatch):
    """Of the product of a vector, which ends within a block, and a scalar, from the second block on."""
    monkeypatch.setattr(codec, "TILE", 2)
    mine, definition = codec.KerasCodec(), NumpyCodec()
    g = numbers(blocks * BLOCK - 7, blocks)
    g[BLOCK : 2 * BLOCK] = 0

    def product(kind, values, scalar):
        vector = Elementwise(operator.mul, (blocks_in(values),), (scalar,))
        return kind.encode_with_rest(vector, 1, blocks, bits)

    @tf.function(autograph=False)
    def encode(g, scalar):
        again = mine.encode(Elementwise(operator.mul, (blocks_in(g),), (scalar,)), 1, blocks, bits)
        return again, *product(mine, g, scalar)

    concrete = encode.get_concrete_function(tf.constant(g), tf.constant(3.0))
    assert [loops(each) for each in functions_in(concrete)] == [
        ["StatelessWhile"] if bits < 32 else [],
        ["StatelessWhile"],
    ]
    message, rest = product(definition, g, np.float32(3))
    again, found, left = encode(tf.constant(g), tf.constant(3.0))
    assert np.array_equal(again, message)
    assert np.array_equal(found, message)
    assert np.array_equal(left, rest)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("traced", [False, True])
def test_messages_are_decoded_together(bits, traced):
    mine, definition = codec.KerasCodec(), NumpyCodec()
    vectors = [numbers(n * BLOCK, n) for n in (3, 0, 2)]
    messages = [definition.encode(plain(g), 0, len(g) // BLOCK, bits) for g in vectors]

    def decode(*of):
        return mine.decode(mine.cut_all(of, bits), bits)

    found = (tf.function(decode, autograph=False) if traced else decode)(*map(tf.constant, messages))
    decoded = [definition.decode(definition.cut(message, bits), bits) for message in messages]
    assert np.array_equal(found, np.concatenate(decoded))


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("weight", [0.0, 1.0, 0.25])
def test_a_weight_of_0_leaves_no_nan_and_one_of_1_changes_nothing(long, weight, monkeypatch):
    monkeypatch.setattr(ops, "LONG", 4 if long else 100)
    traced_ops = ops.TracedOps("SlowMo", (1, 1))
    x = np.array([1.5, -0.0, np.nan, 3.0, 1e-30], np.float32)
    work = tf.function(lambda w: traced_ops.weighted(w, lambda: tf.constant(x), lambda: None), autograph=False)
    found = work(tf.constant(weight, tf.float64)).numpy()
    expected = {0.0: np.zeros(5, np.float32), 1.0: x, 0.25: x * np.float32(0.25)}[weight]
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("holds", [False, True])
def test_a_choice_between_two_tensors(long, holds, monkeypatch):
    monkeypatch.setattr(ops, "LONG", 2 if long else 100)
    traced_ops = ops.TracedOps("SlowMo", (1, 1))
    chosen = tf.function(
        lambda holds: traced_ops.choose(holds, lambda: tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])),
        autograph=False,
    )
    assert chosen(tf.constant(holds)).numpy().tolist() == ([1.0, 2.0] if holds else [3.0, 4.0])
    assert chosen.get_concrete_function(tf.constant(holds)).output_shapes == [2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "level"), [pytest.param({}, 1e-6, marks=pytest.mark.thorough), ({"bits": 8}, 1e-3)], ids=str
)
def test_xla_compiles_a_worker_alone_whose_tensors_are_long(settings, level, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 4)
    monkeypatch.setattr(codec, "TILE", 1)
    monkeypatch.setattr(ops, "LONG", 1)

    def weights(compiled):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(700, "tanh"), keras.layers.Dense(2)])
        optimizer = SlowMo(keras.optimizers.SGD(0.01), SlowMoConfig(tau=2, beta=0.5, **settings))
        fit(model, optimizer, range(5), compiled={"jit_compile": compiled})
        return held(model)

    for a, b in zip(weights(True), weights(False), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=level)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4, "delay": 1, "nonfinite": "exclude"},
        pytest.param({"bits": 8, "shard": True}, marks=pytest.mark.thorough),
        pytest.param({"bits": 8, "fragments": 4, "delay": 2}, marks=pytest.mark.thorough),
        pytest.param({"bits": 32}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_training_is_bitwise_the_same(settings, monkeypatch):
    """Of a tiny model, once as a large one is treated."""
    at_once = ThreadWorld(2).run(lambda comm: trained(settings, comm))
    monkeypatch.setattr(tiles, "TILE", 500)
    monkeypatch.setattr(codec, "TILE", 1)
    monkeypatch.setattr(ops, "LONG", 1)
    in_tiles = ThreadWorld(2).run(lambda comm: trained(settings, comm))
    for mine, other in zip(in_tiles, at_once, strict=True):
        assert mine.keys() == other.keys()
        assert all(np.array_equal(mine[name], other[name]) for name in mine)
