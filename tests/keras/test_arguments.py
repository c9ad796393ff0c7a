"""The constructor's arguments: settings as keywords, optimizers by name, and habits from Horovod."""

import logging
import re

import keras
import numpy as np
import pytest

from hvd_slowmo.core.start.arguments import HOROVODS_ARGUMENTS
from hvd_slowmo.tf import SlowMo, SlowMoConfig
from support.models.keras_optimizers import SGD, Scaled


def test_settings_are_optional_and_may_be_keywords():
    assert SlowMo(SGD(0.1)).config == SlowMoConfig()
    assert SlowMo(SGD(0.1), tau=3, beta=0.25, metrics=True).config == SlowMoConfig(tau=3, beta=0.25)


def test_optimizers_resolve_as_in_compile():
    assert type(SlowMo("adam", tau=3).inner_optimizer) is keras.optimizers.Adam
    config = {"class_name": "SGD", "config": {"learning_rate": 0.25}}
    optimizer = SlowMo(config, SlowMoConfig(tau=3))
    assert type(optimizer.inner_optimizer) is keras.optimizers.SGD
    assert float(optimizer.learning_rate) == 0.25
    scaled = SlowMo(keras.saving.serialize_keras_object(Scaled(SGD(0.25))), tau=3)
    assert isinstance(scaled, keras.optimizers.LossScaleOptimizer)  # as around the object itself


def test_an_optimizer_of_a_name_and_keywords_is_saved_and_restored():
    again = SlowMo.from_config(SlowMo("adam", tau=3, name="d").get_config())
    assert type(again.inner_optimizer) is keras.optimizers.Adam
    assert again.config == SlowMoConfig(tau=3)
    assert again.name == "d"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"config": SlowMoConfig(), "tau": 3}, TypeError, "not both. Received: a config and tau"),
        ({"tau": 0}, ValueError, "`tau` must be a positive integer or None. Received: tau=0"),
        ({"bta": 0.5}, TypeError, "SlowMo has no setting `bta`. Did you mean `beta`? It takes: tau, alpha,"),
        ({"clipnorm": 1.0}, TypeError, "SlowMo has no setting `clipnorm`."),
        ({"op": 1}, TypeError, f"no setting `op`. {HOROVODS_ARGUMENTS['op']}"),
        ({"backward_passes_per_step": 2}, TypeError, "gradient_accumulation_steps of the inner optimizer in Keras"),
    ],
)
def test_wrong_keywords_say_what_takes_their_place(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        SlowMo(SGD(0.1), **options)


def test_a_scaled_optimizer_is_slowmo_to_the_user_too():
    with pytest.raises(TypeError, match=r"^SlowMo has no setting `metric`. Did you mean `metrics`\?"):
        SlowMo(Scaled(SGD(0.1)), metric=True)


def test_several_models_bring_their_variables():
    models = [keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]) for _ in range(2)]
    with pytest.raises(TypeError, match=r"Received: Sequential. .*\[\*encoder.variables, \*decoder.variables\]"):
        SlowMo(SGD(0.1)).broadcast(models)
    optimizer = SlowMo(SGD(0.1))
    optimizer.broadcast([v for model in models for v in model.variables])
    assert optimizer.steps == 0


def test_horovods_optimizer_can_not_be_put_around_slowmo():
    hvd = pytest.importorskip("horovod.tensorflow.keras")
    for optimizer in (SlowMo(SGD(0.1)), SlowMo(Scaled(SGD(0.1)))):
        with pytest.raises(TypeError, match=r"can't be put around SlowMo.* give SlowMo gradients='all'"):
            hvd.DistributedOptimizer(optimizer)


def test_horovods_optimizer_is_not_wrapped():
    hvd = pytest.importorskip("horovod.tensorflow.keras")
    inner = hvd.DistributedOptimizer(SGD(0.1))
    assert float(inner.learning_rate) == np.float32(0.1)
    with pytest.raises(TypeError, match=r"is a hvd.DistributedOptimizer, .*Keep one of the two"):
        SlowMo(inner)
    with pytest.raises(TypeError, match=r"is a hvd.DistributedOptimizer"):
        SlowMo(Scaled(inner))


def test_one_line_tells_that_slowmo_is_at_work(caplog):
    variable, optimizer = keras.Variable(np.ones(3, "float32")), SlowMo("sgd", tau=4)
    with caplog.at_level(logging.INFO, "hvd_slowmo"):
        for _ in range(2):
            optimizer.broadcast([variable])
    words = "slowmo: local SGD with slow momentum (tau=4, alpha=1, beta=0.5), 1 worker; 24 bytes of memory"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(words)


def test_a_job_that_torchrun_has_started_is_told_to_use_horovod(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(
        ValueError, match=r"torchrun or a launcher like it has started 2 workers, and Horovod has 1"
    ) as e:
        SlowMo(SGD(0.1), tau=2).broadcast(model)
    assert "horovodrun -np 2" in str(e.value)
