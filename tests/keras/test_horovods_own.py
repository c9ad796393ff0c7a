"""Horovod's own classes for Keras, left in a script: they say what to use instead, and change nothing."""

import importlib

import keras
import numpy as np
import pytest

from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.tf import SlowMo, SlowMoCallback
from support.models.keras import net

tensorflow_elastic = pytest.importorskip("horovod.tensorflow.elastic")


class State:
    """As much of an elastic state as Horovod's callbacks need to be made."""

    batch = epoch = 0


HOROVODS = {
    "BroadcastGlobalVariablesCallback": ("callbacks", (0,), "SlowMoCallback does this"),
    "MetricAverageCallback": ("callbacks", (), "SlowMoCallback does this"),
    "LearningRateWarmupCallback": ("callbacks", (0.1,), "a schedule as the learning rate, without"),
    "LearningRateScheduleCallback": (
        "callbacks",
        (0.1, 1.0),
        r"keras\.callbacks\.LearningRateScheduler on",
    ),
    "CommitStateCallback": ("elastic", (State(),), r"SlowMoCallback\(state=state\)"),
    "UpdateBatchStateCallback": ("elastic", (State(),), r"SlowMoCallback\(state=state\)"),
    "UpdateEpochStateCallback": ("elastic", (State(),), r"SlowMoCallback\(state=state\)"),
}


def compiled():
    model = net()
    optimizer = SlowMo(keras.optimizers.Adam(0.1), tau=2, comm=SoloComm())
    model.compile(optimizer, "mse")
    return model, optimizer


def batches():
    rng = np.random.default_rng(0)
    return rng.normal(size=(8, 4)).astype("float32"), rng.normal(size=(8, 2)).astype("float32")


def states():
    from horovod.keras.elastic import KerasState
    from horovod.tensorflow.keras.elastic import KerasState as TensorFlowsKerasState

    return [tensorflow_elastic.TensorFlowKerasState, KerasState, TensorFlowsKerasState]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.slow
@pytest.mark.sample(every=4)
def test_an_elastic_state_of_slowmo_is_refused(number, trained, given):
    model, optimizer = compiled()
    if trained:
        model.fit(*batches(), batch_size=2, verbose=0, callbacks=[SlowMoCallback()])
    steps, before = optimizer.steps, [v.numpy() for v in [*model.variables, *optimizer.variables]]
    words = r"^hvd\.elastic\.KerasState would give .* optimizer\.save\(path\), and call optimizer\.load\(path\) after"
    with pytest.raises(ValueError, match=words):
        states()[number](model, optimizer if given else None, batch=0)
    after = [*model.variables, *optimizer.variables]
    assert all(np.array_equal(v, value) for v, value in zip(after, before, strict=True))
    assert optimizer.steps == steps == (4 if trained else 0)


def test_an_elastic_state_that_was_made_around_another_optimizer_is_refused_when_it_reaches_slowmo():
    """A model may be compiled anew after its state was made."""
    model, optimizer = compiled()
    with pytest.raises(ValueError, match=r"^hvd\.elastic\.KerasState would give"):
        tensorflow_elastic._broadcast_model(keras.Sequential(), optimizer, keras.backend)
    state = object.__new__(tensorflow_elastic.TensorFlowKerasState)
    state.__dict__.update(model=model, optimizer=optimizer)
    for refused in (state._save_model, state._load_model):
        state.__dict__.update(_saved_model_state=[], _saved_optimizer_state=[])
        with pytest.raises(ValueError, match=r"^hvd\.elastic\.KerasState would give"):
            refused()


@pytest.mark.parametrize("module", ["horovod.keras", "horovod.tensorflow.keras"])
@pytest.mark.slow
def test_each_callback_of_horovods_is_refused_with_its_replacement(module):
    for name, (part, arguments, words) in HOROVODS.items():
        model, optimizer = compiled()
        theirs = getattr(importlib.import_module(f"{module}.{part}"), name)(*arguments)
        with pytest.raises(ValueError, match=rf"^Horovod's callbacks do not work.* {name}: {words}"):
            model.fit(*batches(), verbose=0, callbacks=[theirs, SlowMoCallback()])
        assert optimizer.steps == 0


@pytest.mark.slow
def test_several_of_horovods_callbacks_are_one_error_and_the_next_fit_trains():
    from horovod.keras.callbacks import BroadcastGlobalVariablesCallback, MetricAverageCallback

    class Mine(MetricAverageCallback):
        pass

    model, optimizer = compiled()
    words = r"BroadcastGlobalVariablesCallback: [^;]*; MetricAverageCallback: [^;]*this\.$"
    with pytest.raises(ValueError, match=words):
        model.fit(*batches(), verbose=0, callbacks=[SlowMoCallback(), BroadcastGlobalVariablesCallback(0), Mine()])
    model.fit(*batches(), batch_size=4, verbose=0, callbacks=[SlowMoCallback()])
    assert optimizer.steps == 2


@pytest.mark.slow
def test_a_callback_of_horovods_name_alone_is_not_refused():
    class MetricAverageCallback(keras.callbacks.Callback):
        pass

    model, optimizer = compiled()
    model.fit(*batches(), batch_size=4, verbose=0, callbacks=[SlowMoCallback(), MetricAverageCallback()])
    assert optimizer.steps == 2
