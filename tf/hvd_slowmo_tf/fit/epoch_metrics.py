"""The metrics of an epoch over all workers: the workers' states of a metric are added up, and give one result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CLOSE = 1e-5
"""Relative difference by which a logged value, computed in a trace, may differ from its metric's result here."""


class MetricState(NamedTuple):
    """A metric's result and variables on one worker, at one moment."""

    result: Array
    state: list[Array] | None  # None if the states of several workers can't be added up


class WorkerLogs(NamedTuple):
    """One worker's logs, with all that is needed to average them."""

    values: dict[str, Array]  # as logged
    weight: float  # number of samples behind them; of batches, where samples are unknown
    metrics: dict[str, MetricState]  # by the names of their results


class EpochMetrics(NamedTuple):
    """The metrics of all workers.

    Attributes:
        values: by name, alike on all workers.
        averaged: names of the values that are weighted means of the workers', because no metric of Keras is behind
            them.
    """

    values: dict[str, Array]
    averaged: list[str]


def metrics_by_result(metrics: Iterable[keras.Metric]) -> dict[str, keras.Metric]:
    """Return single metrics by the names of their results in the logs, those within compile()'s one among them."""
    found: dict[str, keras.Metric] = {}
    for metric in metrics:
        inner = getattr(metric, "metrics", None)  # compile() collects its metrics in one
        if inner is None:
            found[metric.name] = metric
        elif inner:
            names = list(metric.result())
            if len(names) == len(inner):  # else two results have one name
                found |= zip(names, inner, strict=True)
    return found


def states_of(metrics: Iterable[keras.Metric]) -> dict[str, MetricState]:
    """Return the present results and variables of a model's metrics, by the names of their results.

    Example:
        >>> mean = keras.metrics.Mean("loss")
        >>> mean.update_state([1.0, 2.0])
        >>> [float(part) for part in states_of([mean])["loss"].state]
        [3.0, 2.0]
    """
    found = {}
    for name, metric in metrics_by_result(metrics).items():
        result = metric.result()
        if not isinstance(result, dict):
            state = [v.numpy() for v in metric.variables] if _adds_up(metric) else None
            found[name] = MetricState(np.asarray(result), state)
    return found


def numbers_in(logs: Mapping[str, Any]) -> dict[str, Array]:
    """Return the values among logs that are numbers, or arrays of them."""
    arrays = {key: np.asarray(value) for key, value in logs.items()}
    return {key: value for key, value in arrays.items() if value.dtype.kind in "fiub"}


def over_workers(metrics: Iterable[keras.Metric], everyone: Sequence[WorkerLogs]) -> EpochMetrics:
    """Return the logs over all workers. They depend on `everyone` alone, so all workers get the same.

    - A value that is the result of one of Keras' metrics is the result of the workers' summed states: that of one
      worker with all data. A custom train_step may log it under another name; it is known by its value then.
    - Any other value is the workers' mean, weighted by samples.

    Args:
        metrics: of the model.
        everyone: the logs of each worker.

    Example:
        >>> count = keras.metrics.Sum("count")
        >>> count.update_state([2.0])
        >>> own = WorkerLogs({"count": np.asarray(2.0), "other": np.asarray(1.0)}, 4.0, states_of([count]))
        >>> values = over_workers([count], [own, own]).values
        >>> float(values["count"]), float(values["other"])
        (4.0, 1.0)
    """
    own = metrics_by_result(metrics)
    values: dict[str, Array] = {}
    averaged = []
    for key in dict.fromkeys(key for each in everyone for key in each.values):
        having = [each for each in everyone if key in each.values]
        name = _metric_behind(key, having, own)
        if name is not None:
            values[key] = _result_of_all(own[name], [each.metrics[name].state or [] for each in having])
            continue
        mean = _mean(key, having)
        if mean is not None:
            values[key] = mean
            averaged.append(key)
    return EpochMetrics(values, averaged)


def _adds_up(metric: keras.Metric) -> bool:
    """Return whether the sum of two workers' states is the state of one worker with the data of both.

    It is so for all metrics of Keras, and for those made from them. Nothing is known of other classes.
    """
    base = next(cls for cls in type(metric).__mro__ if cls.__module__.startswith("keras."))
    return base is not keras.Metric and bool(metric.variables)


def _metric_behind(key: str, having: Sequence[WorkerLogs], own: Mapping[str, keras.Metric]) -> str | None:
    """Return the name of the metric whose result was logged on every worker, and whose states can be added up."""
    for name in (key, *(name for name in own if name != key)):
        found = [each.metrics.get(name) for each in having]
        if name in own and all(
            state is not None and state.state is not None and _same(each.values[key], state.result)
            for each, state in zip(having, found, strict=True)
        ):
            return name
    return None


def _same(logged: Array, result: Array) -> bool:
    return logged.shape == result.shape and bool(np.allclose(logged, result, CLOSE, 0, equal_nan=True))


def _result_of_all(metric: keras.Metric, states: Sequence[list[Array]]) -> Array:
    summed = [np.sum(np.stack(parts), axis=0, dtype=np.float64) for parts in zip(*states, strict=True)]
    pairs = [
        (v, keras.ops.convert_to_tensor(value, v.dtype)) for v, value in zip(metric.variables, summed, strict=True)
    ]
    with keras.StatelessScope(state_mapping=pairs):
        return np.asarray(metric.result())


def _mean(key: str, having: Sequence[WorkerLogs]) -> Array | None:
    total = sum(each.weight for each in having)
    if not total or len({each.values[key].shape for each in having}) > 1:
        return None
    return np.asarray(sum(each.values[key] * (each.weight / total) for each in having if each.weight))
