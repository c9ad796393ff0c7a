"""Variables that are not trained: which are averaged by themselves, and which by the user's choice."""

import keras
import numpy as np
import pytest

import hvd_slowmo.tf as slowmo
from hvd_slowmo_tf.model.layout import parts_of
from hvd_slowmo_tf.model.statistics import chosen_statistics
from support.jobs.keras_statistics import student


@pytest.mark.parametrize(
    ("choice", "averaged"),
    [
        ({}, ["queue"]),
        ({"*/queue": False}, []),
        ({"net/teacher/*": True}, ["queue", "kernel"]),
        ({"*": False, "*/teacher/*": True}, ["kernel"]),
        ({"net*/q_7/queue": False}, []),
    ],
)
def test_patterns_choose_and_the_last_that_fits_decides(choice, averaged):
    model = student("q_7")
    found = chosen_statistics(*parts_of(model), model.trainable_variables, choice)
    assert [v.name for v in found] == averaged


def test_nonsense_is_refused(caplog):
    def start(choice, **options):
        slowmo.SlowMo("sgd", tau=2, statistics=choice, **options).broadcast(student())

    with pytest.raises(ValueError, match=r"has 'student/kernel', and no tensor .* net/q/queue, net/q/count, net/teach"):
        start({"student/kernel": True})
    with pytest.raises(TypeError, match="averages net/q/count, which has type int32 and no mean"):
        start({"*/count": True})
    for wrong in (["queue"], {"queue": "own"}, {3: True}):
        with pytest.raises(TypeError, match="must map patterns of names to bools"):
            start(wrong)
    with pytest.raises(ValueError, match="give no `statistics`"):
        start({"*/queue": False}, parameter_map=slowmo.ParameterMap())
    assert not caplog.text
    start({"*cache": False})
    assert "'*cache', and no tensor of that name is there" in caplog.text


def test_the_choice_is_a_part_of_the_optimizers_config():
    optimizer = slowmo.SlowMo("sgd", tau=2, statistics={"*/queue": False})
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert again.worker.statistics == {"*/queue": False}
    assert again.get_config() == optimizer.get_config()


@pytest.mark.workers
@pytest.mark.slow
@pytest.mark.parametrize("choice", [None, {"*/queue": False, "*/teacher/*": True}], ids=["left alone", "chosen"])
@pytest.mark.sample("chosen")
def test_two_workers_leave_a_queue_alone_and_average_the_teachers(choice, keras_workers):
    results = keras_workers(2).run("support.jobs.keras_statistics:train", choice=choice)
    for rank, found in enumerate(results):
        queue, teacher = (0.5, float(rank)) if choice is None else (float(rank), 0.5)
        np.testing.assert_array_equal(found["queue"], np.full((2, 2), queue))
        np.testing.assert_array_equal(found["teacher"], np.full((1, 1), teacher))
    for a, b in zip(*(found["student"] for found in results), strict=True):
        np.testing.assert_array_equal(a, b)
