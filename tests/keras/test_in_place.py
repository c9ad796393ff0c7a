"""Variables written in place: the right elements, no reader that sees them change, and no copies for ever after."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_slowmo.tf import SlowMo, SlowMoConfig
from hvd_slowmo.wire.views import View
from hvd_slowmo_tf.traces import in_place
from support.models.keras import fit, held, memory, net
from support.problems import chunks_of
from support.views import views


def written(view, start, stop, traced, function=in_place.assign):
    """Return a variable of ones after stretch has been set to 2, 3, ..."""
    variable = tf.Variable(tf.ones(view.own))
    value = tf.range(2.0, 2.0 + stop - start)

    def work():
        function(variable, view, start, stop, value)

    (tf.function(work, autograph=False) if traced else work)()
    return variable.numpy()


@pytest.mark.slow
@given(views(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_stretch_of_a_view(view, data):
    """Of any variable that a worker of PyTorch holds in another way."""
    start = data.draw(st.integers(0, view.size))
    stop = data.draw(st.integers(start, view.size))
    expected = np.ones(view.own, np.float32)
    view.write(expected, start, stop, np.arange(2.0, 2.0 + stop - start, dtype=np.float32))
    function = data.draw(st.sampled_from([in_place.assign, in_place.assign_in_place]))
    found = written(view, start, stop, data.draw(st.booleans()), function)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(700,), (50, 14), (50, 16), (5, 7, 20), (2, 3, 4, 5, 6)], ids=str)
def test_rows_and_single_elements(shape):
    size = int(np.prod(shape))
    start, stop = size // 3, size - 5
    expected = np.ones(size, np.float32)
    expected[start:stop] = np.arange(2.0, 2.0 + stop - start)
    np.testing.assert_array_equal(written(View.same(shape), start, stop, traced=True).reshape(-1), expected)


@pytest.mark.parametrize("shape", [(640,), (20, 32)], ids=str)
def test_a_tensor_that_was_read_before_keeps_its_values(shape):
    variable = tf.Variable(tf.ones(shape))
    before = variable.value()
    in_place.assign(variable, View.same(shape), 100, 200, tf.zeros([100]))
    assert np.sum(variable.numpy() == 0) == 100
    assert np.all(before.numpy() == 1)


@pytest.mark.parametrize("shape", [(640,), (20, 32)], ids=str)
def test_reading_copies_nothing_afterwards(shape):
    variable = tf.Variable(tf.ones(shape))

    @tf.function(autograph=False)
    def write():
        in_place.assign(variable, View.same(shape), 100, 200, tf.zeros([100]))

    before = memory(variable)
    write()
    assert memory(variable) == memory(variable) == before


def test_a_variable_keeps_its_own_memory():
    """And no part of another one's, whose next change would first move all of it."""
    whole, part = tf.Variable(tf.ones([64])), tf.Variable(tf.zeros([32]))

    @tf.function(autograph=False)
    def copy():
        in_place.assign_in_place(part, View.same((32,)), 0, 32, whole.value()[:32])

    before = memory(whole)
    copy()
    whole.assign_add(tf.ones([64]))
    assert memory(whole) == before
    assert np.all(part.numpy() == 1)


def test_a_chunk_that_waits_for_its_turn_does_not_make_a_write_move_the_variable(monkeypatch):
    """A blocking outer step writes one while the next one, which was read before, travels."""
    monkeypatch.setattr(in_place, "LARGE", 1)
    kernel = keras.Variable(np.zeros((64, 16), np.float32))
    optimizer = SlowMo(keras.optimizers.SGD(0.1), SlowMoConfig(tau=2))
    with chunks_of(512):
        optimizer.broadcast([kernel])
    first, second, *_ = optimizer.worker.ready().assembly.layout.layout.chunks
    assert first.size == second.size == 128
    store = optimizer.worker.traces._store
    kernel.assign(tf.fill([64, 16], 0.0))  # in memory of its own, which neither NumPy nor an anchor has

    waiting = store.read("model", second)
    before = memory(kernel.value)
    for chunk in (first, second):
        store.write("model", chunk, tf.ones([chunk.size]))
    assert memory(kernel.value) == before
    assert np.all(waiting.numpy() == 0)
    np.testing.assert_array_equal(kernel.numpy().reshape(-1), [1.0] * 256 + [0.0] * 768)


@pytest.mark.slow
def test_an_optimizer_that_xla_compiles_later_on(monkeypatch):
    """A worker alone: XLA has no such operations as a trace that it does not compile."""
    monkeypatch.setattr(in_place, "LARGE", 1)

    def weights(compiled):
        model, optimizer = net(), SlowMo(keras.optimizers.SGD(0.1), SlowMoConfig(tau=2, beta=0.5))
        fit(model, optimizer, range(3))
        fit(model, optimizer, range(3, 6), compiled={"jit_compile": compiled})
        return held(model)

    for a, b in zip(weights(True), weights(False), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
