"""Metrics over all workers: those of one worker with all data."""

import keras
import numpy as np
import pytest

from hvd_slowmo_tf.fit.epoch_metrics import WorkerLogs, metrics_by_result, numbers_in, over_workers, states_of

metrics = keras.metrics
SIZES = (3, 10, 0)  # samples of each worker


class Custom(metrics.Metric):
    """Maximum, whose state can't be added up."""

    def __init__(self):
        super().__init__(name="custom")
        self.most = self.add_variable((), "zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.most.assign(keras.ops.maximum(self.most, keras.ops.max(y_pred)))

    def result(self):
        return self.most + 0.0


class Derived(metrics.Mean):
    """Mean of a function of its own."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(keras.ops.abs(y_true - y_pred), sample_weight)


KINDS = {
    "TruePositives": metrics.TruePositives,
    "FalseNegatives": lambda: metrics.FalseNegatives(thresholds=[0.2, 0.8]),
    "Precision": metrics.Precision,
    "Recall": metrics.Recall,
    "AUC": lambda: metrics.AUC(num_thresholds=20),
    "BinaryAccuracy": metrics.BinaryAccuracy,
    "RootMeanSquaredError": metrics.RootMeanSquaredError,
    "F1Score": lambda: metrics.F1Score(threshold=0.5),
    "R2Score": metrics.R2Score,
    "BinaryIoU": metrics.BinaryIoU,
    "PrecisionAtRecall": lambda: metrics.PrecisionAtRecall(0.5, num_thresholds=20),
    "Derived": Derived,
}


def samples(size, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(2, size=(size, 1)).astype("float32"), rng.uniform(size=(size, 1)).astype("float32")


def measured(make, parts):
    metric = make()
    for y, prediction in parts:
        if len(y):
            metric.update_state(y, prediction)
    return metric


@pytest.mark.parametrize("kind", KINDS)
def test_a_metric_of_keras_is_that_of_all_data(kind):
    data = [samples(size, seed) for seed, size in enumerate(SIZES)]
    if kind in ("F1Score", "R2Score"):  # not built without data
        data = data[:2]
    whole = measured(KINDS[kind], data)
    own = [measured(KINDS[kind], [part]) for part in data]
    everyone = []
    for metric, (y, _) in zip(own, data, strict=True):
        metric.name = whole.name
        everyone.append(WorkerLogs(numbers_in({"logged": metric.result()}), len(y), states_of([metric])))
    before = [v.numpy() for v in own[0].variables]
    found = over_workers([own[0]], everyone)
    np.testing.assert_allclose(found.values["logged"], np.asarray(whole.result()), rtol=1e-6)
    assert not found.averaged
    assert all(np.array_equal(v.numpy(), value) for v, value in zip(own[0].variables, before, strict=True))


@pytest.mark.slow
def test_metrics_of_compile_are_taken_apart_and_others_averaged_by_samples():
    workers = []
    for seed, size in ((0, 4), (1, 12)):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, "sigmoid", kernel_initializer="ones")])
        model.compile("sgd", "mse", metrics=[metrics.TruePositives(name="hits"), Custom()], weighted_metrics=["mae"])
        y, x = samples(size, seed)
        logs = model.evaluate(x, y, verbose=0, return_dict=True)
        workers.append((model, WorkerLogs(numbers_in(logs), size, states_of(model.metrics))))
    model = workers[0][0]
    assert list(metrics_by_result(model.metrics)) == ["loss", "hits", "custom", "mae"]
    everyone = [each for _, each in workers]
    found = over_workers(model.metrics, everyone)
    first, second = (each.values for each in everyone)
    assert found.values["hits"] == first["hits"] + second["hits"] > 0
    for key in ("loss", "mae", "custom"):
        assert found.values[key] == pytest.approx((4 * first[key] + 12 * second[key]) / 16, rel=1e-6)
    assert found.averaged == ["custom"]


def test_a_value_that_is_not_the_result_of_the_metric_of_its_name_is_averaged():
    unused = metrics.Mean("loss")
    logs = [WorkerLogs({"loss": np.asarray(v)}, weight, states_of([unused])) for v, weight in ((1.0, 1.0), (3.0, 3.0))]
    found = over_workers([unused], [*logs, WorkerLogs({}, 0.0, {})])
    assert found.values["loss"] == pytest.approx(2.5)
    assert found.averaged == ["loss"]
