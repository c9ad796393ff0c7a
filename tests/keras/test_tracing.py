"""The contract of keras.optimizers: one trace, and what is in it."""

import gc
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.core.average.ledger import RATES
from hvd_slowmo.tf import SlowMo, SlowMoConfig
from hvd_slowmo_tf.traces.graph_comm import GraphSafeComm
from support.models.keras import fit, held, memory, net, sentences, step_of, words
from support.models.keras_optimizers import SGD
from support.problems import chunks_of, config_of

# Keras turns bfloat16 and h5 files into NumPy in a way that NumPy 2 warns of, whatever the optimizer.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def operations(graph):
    """Names of all operations, in the functions that it calls too."""
    found = [op.type for op in graph.get_operations()]
    for function in graph.as_graph_def().library.function:
        found += [node.op for node in function.node_def]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"tau": 2}, {"tau": 2, "warmup_steps": 3, "inner_state": "reset"}], ids=str)
@pytest.mark.sample("{'tau': 2}")
def test_one_trace_serves_the_training_and_python_has_no_part_in_it(config):
    model, optimizer = net(), SlowMo(SGD(0.1, momentum=0.5), config_of(config), metrics=True)
    fit(model, optimizer, range(5), epochs=4)
    assert optimizer.worker.step.traces == 1
    assert optimizer.steps == 20
    concrete = optimizer.worker.step.function.get_concrete_function(
        [tf.zeros(v.shape) for v in model.trainable_variables]
    )
    assert not [op for op in operations(concrete.graph) if "PyFunc" in op]
    assert optimizer.worker.step.traces == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scaled", "config"),
    [
        (False, {"tau": 2}),
        pytest.param(True, {"tau": 2}, marks=pytest.mark.thorough),
        pytest.param(False, {"tau": 2, "fragments": 2, "delay": 1, "bits": 8}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_a_trace_that_is_replaced_leaves_nothing_behind(scaled, config):
    """As in an elastic job, at each change. TensorFlow would keep the graph around a custom gradient for ever."""
    inner = SGD(0.1, momentum=0.5)
    model, optimizer = net(), SlowMo(keras.optimizers.LossScaleOptimizer(inner) if scaled else inner, **config)
    graphs = []
    for _ in range(3):
        fit(model, optimizer, range(3))
        assert optimizer.worker.step.traces == 1
        optimizer.worker.reassemble(optimizer.worker.comm)
        model.train_function = None
        gc.collect()
        # By type: some objects of PyTorch warn when they are asked for their class.
        graphs.append(sum(issubclass(type(each), tf.__internal__.FuncGraph) for each in gc.get_objects()))
    assert graphs[1] == graphs[2]


@pytest.mark.slow
def test_a_variable_that_was_written_in_place_is_not_copied_for_its_readers():
    """TensorFlow would copy all of it whenever a layer reads it: every step of a training would take longer."""
    with chunks_of(64):
        model, optimizer = net(), SlowMo(SGD(0.1), SlowMoConfig(tau=2))
        fit(model, optimizer, range(4))
    gradients = [tf.zeros(v.shape) for v in model.trainable_variables]
    graph = optimizer.worker.step.function.get_concrete_function(gradients).graph
    found = operations(graph)
    assert "AssignVariableOp" in found
    assert any("StridedSliceAssign" in op or "Scatter" in op for op in found)  # a chunk ends within a variable
    for v in model.trainable_variables:
        kept = v.value.value()  # else a second copy might get the memory of the first one
        assert memory(v.value) == kept._numpy().__array_interface__["data"][0]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize(("bits", "most"), [(8, 700), (32, 500)])
def test_a_trace_grows_little_with_each_fragment(bits, most):
    """Each operation takes a millisecond or two before the first step, and twelve fragments have 36 branches."""
    counts = {}
    for fragments in (2, 4):
        with chunks_of(64):
            model, optimizer = net(), SlowMo(SGD(0.1), SlowMoConfig(tau=4, fragments=fragments, delay=1, bits=bits))
            fit(model, optimizer, range(2))
        gradients = [tf.zeros(v.shape) for v in model.trainable_variables]
        counts[fragments] = len(operations(optimizer.worker.step.function.get_concrete_function(gradients).graph))
    # 582 and 426; in 8 bits it was 975 where a branch repeated what all have in common.
    assert (counts[4] - counts[2]) / 2 < most


@pytest.mark.slow
def test_embeddings_of_any_number_of_words_take_few_traces():
    model, optimizer = words(), SlowMo(SGD(0.1), SlowMoConfig(tau=2))
    step = step_of(model, optimizer)
    for samples in (3, 4, 5, 6, 7, 8, 9, 4):
        step(*map(tf.constant, sentences(0, samples, samples)))
    assert optimizer.worker.step.traces <= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"tau": 2},
        {"tau": 2, "inner_state": "reset", "nonfinite": "exclude"},
        {"tau": 2, "fragments": 2, "delay": 1, "bits": 8},
    ],
    ids=str,
)
@pytest.mark.sample("{'tau': 2}")
def test_xla_compiles_a_worker_alone(config):
    compiled, plain = net(), net()
    fit(plain, SlowMo(SGD(0.1, momentum=0.5), config_of(config)), range(5))
    fit(compiled, SlowMo(SGD(0.1, momentum=0.5), config_of(config)), range(5), compiled={"jit_compile": True})
    for a, b in zip(held(compiled), held(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


class Slow(SoloComm):
    """One of two workers; each of its sums takes 50 ms more than the one before."""

    size = 2

    def wait(self, handle):
        def take(x):
            time.sleep(0.05)
            return x

        return tf.ensure_shape(tf.numpy_function(take, [handle], handle.dtype), handle.shape)  # when it runs


def test_seconds_waited_for_several_at_once_are_counted_once():
    comm = GraphSafeComm(Slow(), timed=True)
    started = time.time()
    for handle in [comm.start_sum(f"{number}", tf.zeros([3])) for number in range(3)]:
        comm.wait(handle)
    assert 0.15 <= float(comm.counters[1]) <= time.time() - started


class Doubles(SoloComm):
    """One of two workers that do the same."""

    size, ranks = 2, (0, 1)

    def gather(self, name, item):
        return [item, item]

    def start_sum(self, name, x):
        if not name.endswith("ledger"):
            return x * 2
        rows = tf.reshape(x, [2, -1])
        return tf.reshape(rows + tf.reverse(rows, [0]), [-1])


@pytest.mark.slow
def test_a_variable_more_costs_few_operations():
    """Python makes each of them, in the trace of the step and in that of the join, before the first step."""

    def count(layers):
        model = keras.Sequential([keras.Input((4,)), *[keras.layers.Dense(4) for _ in range(layers)]])
        optimizer = SlowMo(SGD(0.1), SlowMoConfig(tau=2), comm=Doubles())
        optimizer.broadcast(model)
        gradients = [tf.zeros(v.shape) for v in model.trainable_variables]
        step = optimizer.worker.step.function.get_concrete_function(gradients)
        join = optimizer.worker.traces.join.get_concrete_function(tf.constant(0.0, tf.float64))
        return [len(operations(function.graph)) for function in (step, join)]

    few, more = count(2), count(6)
    step, join = ((b - a) / 8 for a, b in zip(few, more, strict=True))  # a layer has two variables
    assert step <= 20
    assert join <= 18


class Mirrored(Doubles):
    """One of two workers that do the same, when it runs; both have one parameter group."""

    def start_sum(self, name, x):
        if not name.endswith("ledger"):
            return x * 2
        rows = tf.reshape(x[: 2 * (RATES + 1)], [2, -1])
        return tf.concat([tf.reshape(rows + tf.reverse(rows, [0]), [-1]), x[2 * (RATES + 1) :] * 2], 0)


def test_a_join_that_only_meets_the_others_is_not_traced():
    model = net()
    optimizer = SlowMo(SGD(0.1), SlowMoConfig(tau=2), comm=Mirrored())
    optimizer.broadcast(model)
    before = held(model)
    assert optimizer.join().behind == 0
    assert optimizer.worker.step.traces == 0
    assert all(np.array_equal(a, b) for a, b in zip(held(model), before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"alpha": 0.7, "nesterov": True}, {"beta": 0.0}], ids=str)
@pytest.mark.sample("{'alpha': 0.7, 'nesterov': True}")
def test_an_outer_step_has_the_same_bits_with_and_without_a_trace(config):
    """A worker in a join takes it without one, beside workers that take it in their traced step."""
    results = []
    for eager in (False, True):
        variable = keras.Variable(np.random.default_rng(0).normal(size=(7, 5)).astype("float32"))
        variable.assign(variable * tf.constant([1.0, 1.0, 1.0, 1.0, -0.0]))
        optimizer = SlowMo(SGD(0.1), config_of({"tau": 2, **config}), comm=Mirrored())
        optimizer.broadcast([variable])
        tf.config.run_functions_eagerly(eager)
        try:
            for step in range(6):
                gradient = np.random.default_rng(step).normal(size=(7, 5)) * [1, 1, 1, 1, 0]
                optimizer.apply([tf.constant(gradient, tf.float32)], [variable])
        finally:
            tf.config.run_functions_eagerly(False)
        results.append([v.numpy().tobytes() for v in (variable, *optimizer.variables)])
    assert results[0] == results[1]
