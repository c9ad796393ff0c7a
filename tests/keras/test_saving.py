"""The contract of keras.optimizers: saving and loading."""

import copy

import keras
import numpy as np
import pytest

from hvd_slowmo.tf import SlowMo, SlowMoCallback, SlowMoConfig
from support.models.keras import batch, fit, held, net, same
from support.models.keras_optimizers import SGD, Adam, Scaled, decay

# Keras turns bfloat16 and h5 files into NumPy in a way that NumPy 2 warns of, whatever the optimizer.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


INNERS = {
    "momentum": lambda: SGD(0.1, momentum=0.875),
    "schedule": lambda: Adam(decay(), clipnorm=0.5),
    "accumulation": lambda: keras.optimizers.Nadam(0.01, gradient_accumulation_steps=2, use_ema=True),
    "scaler": lambda: Scaled(Adam(decay())),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] * (name != "accumulation")) for name in INNERS]
)
def test_a_model_file_goes_on_in_the_middle_of_a_block(name, tmp_path):
    settings = SlowMoConfig(tau=3, inner_state="reset", alpha=0.875)
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
    assert {"step", "since", "rate_steps", "rate_sums", "gamma", "anchor_0", "v_0", "workers", "iteration"} <= names
    inner = optimizer.inner_optimizer.variables
    assert [id(v) for v in optimizer.variables[-len(inner) :]] == [id(v) for v in inner]


@pytest.mark.slow
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


@pytest.mark.slow
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
@pytest.mark.parametrize(
    "callbacks", [pytest.param([], marks=pytest.mark.thorough), [SlowMoCallback]], ids=["alone", "with the callback"]
)
def test_backup_and_restore_in_the_middle_of_a_block_is_the_run_without_a_stop(tmp_path, callbacks):
    def run(folder, stop=None):
        def check(epoch, logs):
            if epoch == stop:
                raise Stop

        last = keras.callbacks.LambdaCallback(on_epoch_begin=check)
        backup = keras.callbacks.BackupAndRestore(str(folder))
        model = net()
        optimizer = SlowMo(Adam(decay()), SlowMoConfig(tau=3, inner_state="reset"))
        fit(model, optimizer, range(5), epochs=4, callbacks=[*[each() for each in callbacks], backup, last])
        return held(model)

    expected = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "stopped", stop=2)
    assert same(run(tmp_path / "stopped"), expected)
