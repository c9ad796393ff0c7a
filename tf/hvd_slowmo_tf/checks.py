"""Arguments that SlowMo refuses, at construction and at the start."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from msgspec import Struct
from numpy.typing import NDArray

from hvd_slowmo.checkpoint.progress import check_progress
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.core.start.arguments import refuse_wrapped
from hvd_slowmo.errors import CheckpointError
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_tf.inner_optimizer import InnerOptimizer


def resolved(inner: Any) -> Any:
    """Return the optimizer that a name or a config stands for, as `compile` does; anything else as it is.

    Raises:
        ValueError: as keras.optimizers.get, no optimizer has this name.
    """
    # A copy, because Keras takes some configs apart.
    return keras.optimizers.get(copy.deepcopy(inner)) if isinstance(inner, (str, dict)) else inner


def check_inner(inner: object) -> None:
    """Refuse an object that is no optimizer to wrap."""
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise TypeError(
            "`inner_optimizer` must be a keras.optimizers.Optimizer, or its name or config. Received: "
            f"{type(inner).__name__}"
        )
    for optimizer in (inner, getattr(inner, "inner_optimizer", None)):
        refuse_wrapped(optimizer)
        if isinstance(optimizer, keras.optimizers.MultiOptimizer):
            raise TypeError(
                "`inner_optimizer` is a MultiOptimizer, which has a learning rate for each of its optimizers. SlowMo "
                "has one for all variables: in a custom training loop, use a SlowMo for each set of variables, each "
                "with another name."
            )


def check_together(inner: InnerOptimizer, config: SlowMoConfig, parameter_map: ParameterMap | None) -> None:
    """Refuse settings that this optimizer can't work with."""
    if parameter_map is not None and inner.moved["use_ema"]:
        raise ValueError(
            "use_ema keeps a moving average that the workers average too, and other frameworks have none: it can't be "
            "used with a parameter_map."
        )
    longest = 1 if config.bits == 32 else 2
    if config.delay > longest:
        raise ValueError(
            f"with a Keras worker delay can be {longest} at most with bits={config.bits}, because nothing can be in "
            f"flight between two calls: a longer one would hide no more. Received: delay={config.delay}. Use delay=1, "
            "or PyTorch workers alone."
        )
    if config.resets_inner_state and isinstance(inner.innermost, keras.optimizers.ScheduleFreeAdamW):
        raise ValueError(
            "ScheduleFreeAdamW keeps parameters in its state: they can't be reset, as inner_state='reset' and "
            "nonfinite='exclude' do. Use inner_state='average'."
        )


def check_model_variables(variables: Sequence[object], model: keras.Model | None, mapped: bool) -> None:
    """Refuse variables with which no job can start."""
    if not variables:
        raise ValueError(
            "there are no variables: the model is not built. Where a worker may have no data, call the model on a "
            "batch before it is trained."
        )
    others = [v for v in variables if not isinstance(v, keras.Variable)]
    if others:
        several = "For several models, [*encoder.variables, *decoder.variables]."
        raise TypeError(
            f"`variables` must be Keras variables, model.variables. Received: {type(others[0]).__name__}. {several}"
        )
    if mapped and model is None:
        raise ValueError("with a parameter_map the layers must be known: call broadcast(model).")


class SavedOptimizer(Struct, frozen=True, forbid_unknown_fields=True):
    """SlowMo's config in a file of Keras: `SlowMo.get_config()`."""

    name: str
    inner_optimizer: dict[str, Any]
    config: dict[str, Any]  # see `hvd_slowmo.checkpoint.facts.parse_config`
    metrics: bool = False
    statistics: dict[str, bool] | None = None


def saved_values(
    store: Mapping[str, NDArray[Any]], variables: Sequence[keras.Variable], scalars: Mapping[str, keras.Variable]
) -> list[NDArray[Any]]:
    """Return the values that a file has for these variables, before any of them changes.

    Args:
        scalars: those of `Progress.flat()`, some of `variables`.

    Raises:
        CheckpointError: their number, a shape or a type differs, or a scalar has a value of no run.
    """
    if len(store.keys()) != len(variables):
        raise CheckpointError(
            f"the file has {len(store.keys())} variables of SlowMo, this optimizer has {len(variables)}. "
            "Load it with the settings and the model of the run that is resumed."
        )
    values = []
    for number, v in enumerate(variables):
        if str(number) not in store:
            raise CheckpointError(f"the file has no variable {str(number)!r} of SlowMo, {v.path}.")
        value, dtype = np.asarray(store[str(number)]), keras.backend.standardize_dtype(v.dtype)
        if tuple(v.shape) != value.shape:
            raise CheckpointError(
                f"{v.path} has shape {value.shape} in the file and {tuple(v.shape)} here. Load it with the "
                "settings and the model of the run that is resumed; with gossip, with as many workers too."
            )
        if dtype in ("int64", "float32", "float64") and value.dtype != dtype:  # NumPy has not all of the others
            raise CheckpointError(f"{v.path} is {value.dtype} in the file and {dtype} here.")
        values.append(value)
    saved = {id(v): value for v, value in zip(variables, values, strict=True)}
    present = {field: v.numpy() for field, v in scalars.items()}
    position = {field: saved[id(v)] for field, v in scalars.items()}
    check_progress(Progress.from_flat(position), Progress.from_flat(present))
    return values


def refuse_strategies() -> None:
    """Refuse a tf.distribute strategy, which makes variables and runs steps in its own ways."""
    if tf.distribute.has_strategy():
        raise ValueError(
            "SlowMo runs one process per device and not under a tf.distribute strategy. Received: "
            f"{type(tf.distribute.get_strategy()).__name__}. Start several workers with horovodrun instead."
        )
