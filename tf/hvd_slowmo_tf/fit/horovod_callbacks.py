"""Horovod's callbacks beside SlowMoCallback: with Keras 3 they fail in the middle of `fit`, or repeat its work."""

from __future__ import annotations

from collections.abc import Sequence

import keras

_ELASTIC = "SlowMoCallback(state=state)"

_REPLACED_BY = {
    "BroadcastGlobalVariablesCallback": "SlowMoCallback does this",
    "MetricAverageCallback": "SlowMoCallback does this",
    "LearningRateWarmupCallback": "a schedule as the learning rate, without hvd.size() in it",
    "LearningRateScheduleCallback": "keras.callbacks.LearningRateScheduler on every rank, without hvd.size() in it",
    "CommitStateCallback": _ELASTIC,
    "UpdateBatchStateCallback": _ELASTIC,
    "UpdateEpochStateCallback": _ELASTIC,
}
"""By the name of the class: horovod.keras and horovod.tensorflow.keras have one each. BestModelCheckpoint is none of
them, since Keras 3 refuses its construction."""


def refusal(callbacks: Sequence[keras.callbacks.Callback]) -> ValueError | None:
    """Return an error that names Horovod's callbacks among these and their replacements; None without any.

    Subclasses count too.

    Example:
        >>> refusal([keras.callbacks.TerminateOnNaN()]) is None
        True
    """
    found = dict.fromkeys(name for each in callbacks if (name := _name_in_horovod(each)) is not None)
    if not found:
        return None
    replacements = "; ".join(f"{name}: {_REPLACED_BY[name]}" for name in found)
    return ValueError(
        f"Horovod's callbacks do not work with Keras 3 and SlowMo. Take them out of callbacks=[...]. {replacements}."
    )


def _name_in_horovod(callback: keras.callbacks.Callback) -> str | None:
    for cls in type(callback).__mro__:
        if cls.__module__.startswith("horovod.") and cls.__name__ in _REPLACED_BY:
            return cls.__name__
    return None
