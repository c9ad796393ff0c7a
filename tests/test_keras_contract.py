"""The contract of keras.optimizers in every corner: each class, setting, callback and kind of model that Keras has."""

import copy
import inspect
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_models import (
    bare,
    batch,
    fill,
    fit,
    held,
    layers,
    loop,
    net,
    same,
    sentences,
    step_of,
    with_statistics,
    words,
)
from problems import chunks_of

import hvd_slowmo.tf
from hvd_slowmo.tf import SlowMo, SlowMoCallback, SlowMoConfig

# Several workers' graphs wait in this process's threads at once; with fewer threads than workers they would wait for
# each other for ever. Set before TensorFlow starts its threads.
tf.config.threading.set_inter_op_parallelism_threads(16)

# Keras turns bfloat16 and h5 files into NumPy in a way that NumPy 2 warns of, whatever the optimizer.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam
Scaled = keras.optimizers.LossScaleOptimizer


@pytest.fixture
def half():
    """mixed_float16 while models are made and compiled."""
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    yield
    keras.mixed_precision.set_dtype_policy("float32")


# Every optimizer of Keras: on one worker Local SGD with tau = 1 is the bare optimizer to the bit.

NOT_WRAPPED_AS_THEY_ARE = {"MultiOptimizer", "LossScaleOptimizer"}  # tests of their own
CLASSES = {
    name: item
    for name, item in sorted(vars(keras.optimizers).items())
    if isinstance(item, type)
    and issubclass(item, keras.optimizers.Optimizer)
    and item is not keras.optimizers.Optimizer
    and name not in NOT_WRAPPED_AS_THEY_ARE
}


def applied(optimizer, steps=5):
    """A matrix and a vector after each step with the same gradients, in a loop that is traced."""
    rng = np.random.default_rng(1)
    variables = [keras.Variable(rng.normal(size=shape), dtype="float32") for shape in ((3, 2), (4,))]
    optimizer.build(variables)  # within a trace ScheduleFreeAdamW would take its start anew in every step

    @tf.function(autograph=False)
    def step(*grads):
        optimizer.apply_gradients(zip(grads, variables, strict=True))

    history = []
    for _ in range(steps):
        step(*[tf.constant(rng.normal(size=v.shape), tf.float32) for v in variables])
        history.append([v.numpy() for v in variables])
    return history


def test_no_optimizer_is_forgotten():
    known = {"SGD", "Adam", "AdamW", "Nadam", "Adagrad", "Adadelta", "RMSprop", "Ftrl", "Lion", "Adamax", "Adafactor"}
    assert known <= CLASSES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_optimizer_is_the_bare_one_to_the_bit(name):
    assert same(applied(bare(CLASSES[name](0.01))), applied(CLASSES[name](0.01)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_every_optimizer_is_the_bare_one_to_the_bit_under_fit(name):
    ours, theirs, optimizer = net(), net(), CLASSES[name](0.01)
    optimizer.build(theirs.trainable_variables)
    fit(theirs, optimizer, range(4))
    fit(ours, bare(CLASSES[name](0.01)), range(4))
    assert same(held(ours), held(theirs))


# TensorFlow's graphs turn a quotient by a square root into a product, so these differ by a rounding from themselves.
ROUNDED_OTHERWISE_IN_A_GRAPH = {"Adafactor", "Adagrad", "Ftrl", "Muon", "RMSprop", "ScheduleFreeAdamW"}


@pytest.mark.slow
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


# Every setting that Keras' optimizers share.


def decay():
    return keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)


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
def test_every_setting_is_the_bare_optimizers_to_the_bit(name):
    assert same(applied(bare(with_settings(name)), 8), applied(with_settings(name), 8))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fit", "several steps per execution", "eager fit"])
@pytest.mark.parametrize("name", ["schedule", "ema_overwrite", "accumulation", "accumulation_ema"])
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


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_the_last_call_of_a_dataset_of_unknown_length_counts_no_step():
    model = net()
    model.compile(SlowMo(SGD(0.1), SlowMoConfig(tau=2)), "mse")
    model.fit(generator(5), epochs=3, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) == 15
    assert model.optimizer.steps == 15


def test_exclude_from_weight_decay():
    def trained(wrap):
        model = net()
        optimizer = wrap(SGD(0.1, weight_decay=0.5))
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return loop(model, optimizer, range(3))

    assert same(trained(bare), trained(lambda inner: inner))


@pytest.mark.slow
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


def test_a_schedule_counts_slowmos_iterations_though_a_reset_starts_the_inner_ones_anew():
    model, optimizer = net(), SlowMo(Adam(decay()), SlowMoConfig(tau=2, buffers="reset"))
    loop(model, optimizer, range(5))
    assert int(optimizer.iterations) == 5
    assert int(optimizer.inner_optimizer.iterations) == 1
    assert float(optimizer.learning_rate) == pytest.approx(0.1 * 0.5**2.5)
    assert float(optimizer.inner_optimizer.learning_rate) == pytest.approx(0.1 * 0.5**2)


# One trace, and what is in it.


def operations(graph):
    """Names of all operations, in the functions that it calls too."""
    found = [op.type for op in graph.get_operations()]
    for function in graph.as_graph_def().library.function:
        found += [node.op for node in function.node_def]
    return found


@pytest.mark.parametrize("config", [{"tau": 2}, {"tau": 2, "warmup_steps": 3, "buffers": "reset"}], ids=str)
def test_one_trace_serves_the_training_and_python_has_no_part_in_it(config):
    model, optimizer = net(), SlowMo(SGD(0.1, momentum=0.5), SlowMoConfig(**config), metrics=True)
    fit(model, optimizer, range(5), epochs=4)
    assert optimizer.engine.traces == 1
    assert optimizer.steps == 20
    concrete = optimizer.engine.step.get_concrete_function([tf.zeros(v.shape) for v in model.trainable_variables])
    assert not [op for op in operations(concrete.graph) if "PyFunc" in op]
    assert optimizer.engine.traces == 1


def test_no_variable_is_assigned_in_part():
    """Once one was, TensorFlow copies all of it whenever a layer reads it: every step of a training takes longer."""
    with chunks_of(64):
        model, optimizer = net(), SlowMo(SGD(0.1), SlowMoConfig(tau=2))
        fit(model, optimizer, range(4))
    concrete = optimizer.engine.step.get_concrete_function([tf.zeros(v.shape) for v in model.trainable_variables])
    found = operations(concrete.graph)
    assert "AssignVariableOp" in found
    assert not [op for op in found if "StridedSliceAssign" in op or "Scatter" in op]


@pytest.mark.slow
def test_embeddings_of_any_number_of_words_take_few_traces():
    model, optimizer = words(), SlowMo(SGD(0.1), SlowMoConfig(tau=2))
    step = step_of(model, optimizer)
    for samples in (3, 4, 5, 6, 7, 8, 9, 4):
        step(*map(tf.constant, sentences(0, samples, samples)))
    assert optimizer.engine.traces <= 3


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"tau": 2}, {"tau": 2, "buffers": "reset", "nonfinite": "exclude"}], ids=str)
def test_xla_compiles_a_worker_alone(config):
    compiled, plain = net(), net()
    fit(plain, SlowMo(SGD(0.1, momentum=0.5), SlowMoConfig(**config)), range(5))
    fit(compiled, SlowMo(SGD(0.1, momentum=0.5), SlowMoConfig(**config)), range(5), compiled={"jit_compile": True})
    for a, b in zip(held(compiled), held(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Half precision.


@pytest.mark.slow
@pytest.mark.parametrize("auto_scale_loss", [False, True])
def test_mixed_float16_with_the_scaler_within(half, auto_scale_loss):
    """Also with the schedule that the innermost optimizer has brought along."""
    ours, theirs = net(), net()
    fit(theirs, Scaled(SGD(decay(), momentum=0.5)), range(5), compiled={"auto_scale_loss": False})
    fit(ours, bare(Scaled(SGD(decay(), momentum=0.5))), range(5), compiled={"auto_scale_loss": auto_scale_loss})
    assert type(ours.optimizer).__mro__[1] is SlowMo
    assert same(held(ours), held(theirs))
    assert int(ours.optimizer.iterations) == 5
    assert float(ours.optimizer.learning_rate) == pytest.approx(0.1 * 0.5**2.5)


def test_the_rate_of_a_scaled_optimizer_is_slowmos():
    optimizer = bare(Scaled(SGD(0.1)))
    variables = [keras.Variable(np.ones(3, "float32"))]
    optimizer.build(variables)
    optimizer.learning_rate = 0.5
    optimizer.apply([tf.constant([2.0**15] * 3)], variables)
    np.testing.assert_array_equal(variables[0].numpy(), 0.5)
    assert int(optimizer.iterations) == 1


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
def test_bfloat16(policy):
    keras.mixed_precision.set_dtype_policy(policy)
    try:
        ours, theirs, slow = net(), net(), net()
        expected = loop(theirs, SGD(0.1), range(3))
        assert same(loop(ours, bare(SGD(0.1)), range(3)), expected)
        optimizer = SlowMo(SGD(0.1), SlowMoConfig(tau=2))
        loop(slow, optimizer, range(4))
        vectors = optimizer._inside.state.vectors
        assert {v.dtype for parts in vectors.values() for v in parts} == {"float32"}
        flat = np.concatenate([v.reshape(-1).astype("float32") for v in held(slow)])
        anchor = tf.cast(vectors["anchor"][0].value, slow.weights[0].dtype)
        np.testing.assert_array_equal(tf.cast(anchor, tf.float32).numpy(), flat)
    finally:
        keras.mixed_precision.set_dtype_policy("float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_of_the_write_never_enters_the_momentum(dtype):
    """Without gradients Delta is 0: v must decay by beta and nothing else, though every write of the model rounds."""
    v = keras.Variable(np.zeros(64), dtype=dtype)
    optimizer = SlowMo(SGD(1.0), SlowMoConfig(tau=1, beta=0.9))
    optimizer.apply([tf.cast(tf.linspace(0.1, 0.3, 64), dtype)], [v])
    vectors = optimizer._inside.state.vectors
    momentum, anchor = vectors["v"][0].numpy(), vectors["anchor"][0].numpy()
    for _ in range(50):
        optimizer.apply([tf.zeros(64, dtype)], [v])
        momentum = momentum * np.float32(0.9)
        anchor = anchor - momentum
        np.testing.assert_array_equal(v.numpy(), vectors["anchor"][0].numpy().astype(v.numpy().dtype))
    np.testing.assert_allclose(vectors["v"][0].numpy(), momentum, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(vectors["anchor"][0].numpy(), anchor, rtol=0, atol=1e-5)


# Saving and loading.

INNERS = {
    "momentum": lambda: SGD(0.1, momentum=0.875),
    "schedule": lambda: Adam(decay(), clipnorm=0.5),
    "accumulation": lambda: keras.optimizers.Nadam(0.01, gradient_accumulation_steps=2, use_ema=True),
    "scaler": lambda: Scaled(Adam(decay())),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INNERS)
def test_a_model_file_goes_on_in_the_middle_of_a_block(name, tmp_path):
    settings = SlowMoConfig(tau=3, buffers="reset", alpha=0.875)
    model = net()
    fit(model, SlowMo(INNERS[name](), settings, name="mine", metrics=True), range(4))
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(other.optimizer, SlowMo)
    assert other.optimizer.config == settings
    assert other.optimizer.get_config() == model.optimizer.get_config()
    assert other.optimizer.steps == model.optimizer.steps
    for k in range(4, 9):
        for each in (model, other):
            each.train_on_batch(*batch(0, k))
    assert same(held(other), held(model))
    values = [[v.numpy() for v in each.optimizer.variables] for each in (other, model)]
    assert same(*values)


@pytest.mark.parametrize("name", INNERS)
def test_config_round_trip(name):
    optimizer = SlowMo(INNERS[name](), SlowMoConfig(tau=5, nesterov=True), name="mine")
    found = keras.saving.serialize_keras_object(optimizer)
    assert found["registered_name"].startswith("hvd_slowmo>")
    again = keras.saving.deserialize_keras_object(copy.deepcopy(found))  # it puts objects into what it is given
    assert keras.saving.serialize_keras_object(again) == found
    assert keras.optimizers.get(copy.deepcopy(found)).config == optimizer.config
    inner = INNERS[name]().get_config()
    mine = found["config"]["inner_optimizer"]["config"]
    differ = {key for key in inner if inner[key] != mine[key]} - {"name", "inner_optimizer"}
    assert not differ  # what has moved to SlowMo is there as it was given


@pytest.mark.slow
def test_all_state_is_in_variables_once():
    model, optimizer = net(), SlowMo(INNERS["accumulation"](), SlowMoConfig(tau=2))
    fit(model, optimizer, range(2))
    assert len({id(v) for v in optimizer.variables}) == len(optimizer.variables)
    assert all(isinstance(v, keras.Variable) for v in optimizer.variables)
    names = {v.name for v in optimizer.variables}
    assert {"step", "since", "covered", "rates", "gamma", "anchor_0", "v_0", "workers", "iteration"} <= names
    inner = optimizer.inner_optimizer.variables
    assert [id(v) for v in optimizer.variables[-len(inner) :]] == [id(v) for v in inner]


@pytest.mark.parametrize("optimizer", [lambda: Adam(0.1), lambda: SlowMo(SGD(0.1), SlowMoConfig(tau=2))])
def test_weights_can_be_loaded_for_another_training(optimizer, tmp_path):
    model, other = net(), net(1)
    fit(model, optimizer(), range(2))
    model.save_weights(tmp_path / "some.weights.h5")
    other.compile(SlowMo(SGD(0.1), SlowMoConfig(tau=2)), "mse")
    with pytest.warns(UserWarning, match=r"not loaded|Skipping"):
        other.load_weights(tmp_path / "some.weights.h5")
    assert same(held(other), held(model))
    assert other.optimizer.steps == 0


@pytest.mark.slow
def test_weights_with_the_optimizers_state_go_on_in_the_middle_of_a_block(tmp_path):
    def built():
        model = net()
        model.compile(SlowMo(SGD(0.1, momentum=0.5), SlowMoConfig(tau=3)), "mse")
        model.optimizer.build(model.trainable_variables)
        return model

    model, other = built(), built()
    for k in range(4):
        model.train_on_batch(*batch(0, k))
    model.save_weights(tmp_path / "some.weights.h5")
    other.load_weights(tmp_path / "some.weights.h5")
    for k in range(4, 8):
        for each in (model, other):
            each.train_on_batch(*batch(0, k))
    assert same(held(other), held(model))
    model.compile(SlowMo(SGD(0.1), SlowMoConfig.local_sgd(3)), "mse")
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="variables of SlowMo, this optimizer has"):
        model.load_weights(tmp_path / "some.weights.h5")


def test_a_state_with_other_shapes_is_refused_before_anything_changes():
    model, optimizer = net(), SlowMo(SGD(0.1), SlowMoConfig(tau=2))
    fit(model, optimizer, range(3))
    store = {str(number): v.numpy() for number, v in enumerate(optimizer._variables)}
    last = len(store) - 1
    with pytest.raises(ValueError, match=r"has shape \(5,\) in the file and .* here"):
        optimizer.load_own_variables({**store, "0": store["0"] + 1, str(last): np.zeros(5)})
    assert all(np.array_equal(v.numpy(), store[str(number)]) for number, v in enumerate(optimizer._variables))


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("callbacks", [[], [SlowMoCallback]], ids=["alone", "with the callback"])
def test_backup_and_restore_in_the_middle_of_a_block_is_the_run_without_a_stop(tmp_path, callbacks):
    def run(folder, stop=None):
        def check(epoch, logs):
            if epoch == stop:
                raise Stop

        last = keras.callbacks.LambdaCallback(on_epoch_begin=check)
        backup = keras.callbacks.BackupAndRestore(str(folder))
        model = net()
        optimizer = SlowMo(Adam(decay()), SlowMoConfig(tau=3, buffers="reset"))
        fit(model, optimizer, range(5), epochs=4, callbacks=[*[each() for each in callbacks], backup, last])
        return held(model)

    expected = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "stopped", stop=2)
    assert same(run(tmp_path / "stopped"), expected)


# Kinds of models.


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


MODELS = {"shared": (shared, batch), "subclassed": (Own, batch), "statistics": (with_statistics, batch)}
MODELS["embedding"] = (words, sentences)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
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
    assert optimizer.engine.traces == 1


@pytest.mark.slow
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


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables:UserWarning")
def test_a_variable_without_a_gradient_stays_as_it_is():
    a, b = (keras.Variable(np.ones(2, "float32"), name=name) for name in "ab")
    optimizer = SlowMo(SGD(0.5, weight_decay=0.5), SlowMoConfig(tau=2, gradients="all"))
    optimizer.apply([tf.constant([1.0, 1.0]), None], [a, b])
    assert a.numpy().tolist() == [0.25, 0.25]
    assert b.numpy().tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="no gradient for any variable"):
        optimizer.apply([None, None], [a, b])


# What is refused.


def test_wrong_arguments():
    config = SlowMoConfig()
    multi = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(default_optimizer=SGD(0.1)))
    free = keras.optimizers.ScheduleFreeAdamW
    for error, words_, make in (
        (TypeError, "must be a keras.optimizers.Optimizer. Received: str", lambda: SlowMo("sgd", config)),
        (TypeError, "`config` must be a SlowMoConfig. Received: dict", lambda: SlowMo(SGD(0.1), {})),
        (TypeError, "`name` must be a string", lambda: SlowMo(SGD(0.1), config, name=3)),
        (ValueError, "`name` may have letters", lambda: SlowMo(SGD(0.1), config, name="a/b")),
        (TypeError, "is a SlowMo optimizer already", lambda: bare(bare(SGD(0.1)))),
        (TypeError, "is a MultiOptimizer, which has a learning rate for each", lambda: bare(multi)),
        (TypeError, "is a MultiOptimizer", lambda: bare(Scaled(multi))),
        (ValueError, "Use buffers='average'", lambda: SlowMo(free(0.1), SlowMoConfig(buffers="reset"))),
        (ValueError, "Use buffers='average'", lambda: SlowMo(free(0.1), SlowMoConfig(nonfinite="exclude"))),
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


@pytest.mark.parametrize("kind", ["parameter", "rate"])
def test_what_is_not_finite_raises_and_nothing_is_written(kind):
    v = keras.Variable(np.ones(2, "float32"))
    optimizer = SlowMo(SGD(0.1), SlowMoConfig(tau=2))
    optimizer.apply([tf.ones(2)], [v])
    anchor = optimizer._inside.state.vectors["anchor"][0].numpy()
    if kind == "rate":
        optimizer.learning_rate = float("nan")
        optimizer.inner_optimizer.update_step = lambda *given: None
    with pytest.raises(ValueError, match=r"not finite|not a finite number"):
        optimizer.apply([tf.constant([1.0, np.nan])], [v])
    np.testing.assert_array_equal(optimizer._inside.state.vectors["anchor"][0].numpy(), anchor)
    assert optimizer.steps == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_keras_on_another_backend_is_a_clear_error(backend):
    pytest.importorskip(backend)
    environment = {**os.environ, "KERAS_BACKEND": backend}
    command = [sys.executable, "-c", "import hvd_slowmo.tf"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"ImportError: hvd_slowmo.tf needs Keras on TensorFlow, and Keras runs on '{backend}' here" in done.stderr


# The other adapter: what one has the other has too, or it is here.

ONLY_PYTORCH = {
    # PyTorch's optimizer contract
    "__getstate__": "pickling is refused; Keras optimizers are serialized by get_config",
    "add_param_group": "Keras has one group of parameters",
    "param_groups": "Keras has one group of parameters",
    "state": "all state is in `variables`",
    "defaults": "see get_config",
    "state_dict": "Keras saves `variables`, and the settings by get_config",
    "load_state_dict": "Keras loads them",
    "step": "apply, apply_gradients",
    "zero_grad": "Keras has no gradients to clear",
    # ours
    "no_sync": "gradient_accumulation_steps of the inner optimizer",
    "base": "inner_optimizer",
    "grad_scale": "a LossScaleOptimizer within",
}
ONLY_KERAS = {
    # Keras' optimizer contract
    "apply": "step",
    "build": "PyTorch's optimizers have their parameters from the start",
    "variables": "state_dict",
    "loss_scale_factor": "GradScaler is PyTorch's way",
    "scale_loss": "GradScaler is PyTorch's way",
    "exclude_from_weight_decay": "parameter groups",
    "finalize_variable_values": "torch.optim.swa_utils",
    "save_own_variables": "state_dict",
    "load_own_variables": "load_state_dict",
    "get_config": "state_dict",
    "from_config": "state_dict",
    # ours
    "broadcast": "construction is a collective in PyTorch",
    "start": "broadcast, for SlowMoCallback",
    "engine": "for SlowMoCallback",
}
SETTINGS_OF_ONE = {"base_optimizer": "inner_optimizer", "model": "broadcast and apply take variables"}


def test_the_adapters_have_the_same_settings_and_methods_but_for_a_table():
    torch_door = pytest.importorskip("hvd_slowmo.torch")

    def public(kind):
        return {name for name in vars(kind) if not name.startswith("_") and name != "__getstate__"}

    here, there = public(SlowMo), public(torch_door.SlowMo)
    assert here - there == ONLY_KERAS.keys()
    assert there - here == ONLY_PYTORCH.keys() & (there - here)
    assert not (there - here) - ONLY_PYTORCH.keys()
    ours = dict(inspect.signature(SlowMo.__init__).parameters)
    theirs = dict(inspect.signature(torch_door.SlowMo.__init__).parameters)
    assert ours.keys() - theirs.keys() == {"inner_optimizer"}
    assert theirs.keys() - ours.keys() == SETTINGS_OF_ONE.keys()
    for name in ours.keys() & theirs.keys():
        assert ours[name].default == theirs[name].default, name
        assert ours[name].kind == theirs[name].kind, name
    for name in here & there:
        mine, other = getattr(SlowMo, name), getattr(torch_door.SlowMo, name)
        if callable(mine) and name != "over":
            extra = inspect.signature(mine).parameters.keys() ^ inspect.signature(other).parameters.keys()
            assert extra <= {"variables", "scaler"}, name  # GradScaler is PyTorch's way
    doors = set(hvd_slowmo.tf.__all__) ^ set(torch_door.__all__)
    assert doors == {"SlowMoCallback"}
