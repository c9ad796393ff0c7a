"""mean() over workers as threads: weights, shapes, values that are not finite, mistakes."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import hvd_slowmo.tf
import hvd_slowmo.torch
from hvd_slowmo.comm.threads import ThreadWorld

MEANS = [hvd_slowmo.torch.mean, hvd_slowmo.tf.mean]
both = pytest.mark.parametrize("mean", MEANS, ids=["torch", "tf"])


def over(values, mean, weights=(1.0, 1.0, 1.0)):
    return ThreadWorld(3).run(lambda comm: mean(values[comm.rank], weights[comm.rank], comm=comm))


def number(value):
    return [value] * 3


@both
def test_numbers_are_weighted(mean):
    assert over([1.0, 2.0, 6.0], mean) == number(3.0)
    assert over([1, 2, 6], mean, (2, 1, 1)) == number(2.5)
    assert over(number(0.1), mean, (3, 5, 7)) == number(pytest.approx(0.1, rel=1e-15))
    assert mean(0.25) == 0.25  # one worker, without Horovod
    assert type(over([1, 2, 6], mean)[0]) is float


@both
def test_workers_of_weight_0_take_no_part(mean):
    assert over([1.0, math.nan, 3.0], mean, (1, 0, 1)) == number(2.0)
    assert over([{"a": 1.0, "b": 2.0}, {}, {"a": 3.0, "b": 4.0}], mean, (1, 0, 1)) == number({"a": 2.0, "b": 3.0})
    assert all(math.isnan(found) for found in over([1.0, 2.0, 3.0], mean, (0, 0, 0)))


@both
def test_values_that_are_not_finite_give_such_means(mean):
    assert over([1.0, math.inf, 3.0], mean) == number(math.inf)
    assert all(math.isnan(found) for found in over([math.inf, -math.inf, 3.0], mean))
    found = over([{"a": math.nan, "b": 1.0}, {"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 3.0}], mean)
    assert all(math.isnan(each["a"]) and each["b"] == 2.0 for each in found)


def test_tensors_keep_their_shape_and_type():
    def torch_values(comm):
        mean = hvd_slowmo.torch.mean
        given = torch.full((2, 1), float(comm.rank), dtype=torch.bfloat16, requires_grad=True)
        found = mean({"half": given, "count": torch.tensor(comm.rank)}, comm=comm)
        assert (found["half"].dtype, found["count"].dtype) == (torch.bfloat16, torch.float32)
        assert not found["half"].requires_grad
        return found["half"].tolist(), found["count"].item()

    def keras_values(comm):
        mean = hvd_slowmo.tf.mean
        given = tf.constant([[comm.rank], [comm.rank]], tf.float16)
        found = mean({"half": given, "count": tf.constant(comm.rank)}, comm=comm)
        assert (found["half"].dtype, found["count"].dtype) == (tf.float16, tf.float32)
        variable = mean(keras.Variable(float(comm.rank)), comm=comm)
        assert variable.numpy() == found["count"].numpy()
        return found["half"].numpy().tolist(), float(found["count"])

    for work in (torch_values, keras_values):
        assert ThreadWorld(2).run(work) == [([[0.5], [0.5]], 0.5)] * 2


@both
@pytest.mark.parametrize(
    ("value", "weight", "words"),
    [
        ("3", 1, "`value` must be a number or a tensor of numbers. Received: '3'"),
        (None, 1, "`value` must be a number or a tensor of numbers. Received: None"),
        (10**400, 1, "`value` must be a number"),
        ({"loss": 1j}, 1, r"`value\['loss'\]` must be a number"),
        (1.0, -1, "`weight` must be a finite number >= 0. Received: weight=-1"),
        (1.0, math.nan, "weight=nan"),
        (1.0, "2", "weight='2'"),
        ({"loss": 1.0}, 1, "rank 1 differs from rank 0: it has loss of shape .* where a value of shape .* expected"),
        (np.ones(2), 1, r"it has a value of shape \(2,\) where a value of shape \(\) is expected"),
    ],
)
def test_a_mistake_on_one_rank_raises_on_every_rank(mean, value, weight, words):
    def work(comm):
        with pytest.raises((TypeError, ValueError), match=words):
            mean(*((value, weight) if comm.rank == 1 else (1.0, 1.0)), comm=comm)
        return mean(1.0, comm=comm)

    assert ThreadWorld(2).run(work) == [1.0, 1.0]


@both
def test_workers_are_given_once(mean):
    with pytest.raises(ValueError, match="Give one of them"):
        mean(1.0, process_set=1, comm=ThreadWorld(1))


def test_a_call_in_a_trace_is_refused():
    with pytest.raises(ValueError, match=r"call it outside of the tf.function"):
        tf.function(lambda x: hvd_slowmo.tf.mean(x), autograph=False)(tf.constant(1.0))
