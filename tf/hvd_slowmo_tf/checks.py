"""Arguments that SlowMo refuses, at construction and at the start."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_tf.inner_optimizer import InnerOptimizer


def check_settings(config: object, name: object, parameter_map: object) -> None:
    """Refuse arguments of another type, and a place where SlowMo can't run."""
    if not isinstance(config, SlowMoConfig):
        raise TypeError(f"`config` must be a SlowMoConfig. Received: {type(config).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a string. Received: {name!r}")
    if not re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9_.-]*", name):
        raise ValueError(f"`name` may have letters, digits, '_', '.' and '-' only. Received: {name!r}")
    if parameter_map is not None and not isinstance(parameter_map, ParameterMap):
        raise TypeError(f"`parameter_map` must be a ParameterMap. Received: {type(parameter_map).__name__}")
    refuse_strategies()


def check_workers(config: SlowMoConfig, process_set: Any, comm: Comm | None) -> None:
    """Refuse workers that do not fit the settings."""
    if comm is not None and process_set is not None:
        raise ValueError("`comm` takes the place of Horovod's workers: give no process_set with it.")
    if config.gradients == "node" and process_set is not None:
        raise ValueError("gradients='node' works on all ranks only: give no process_set.")
    if config.gradients == "node" and comm is not None and comm.size > 1 and comm.node is None:
        raise ValueError("gradients='node' needs the workers of each node. Give a comm that has them as `comm.node`.")


def check_inner(inner: object) -> None:
    """Refuse an object that is no optimizer to wrap."""
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise TypeError(f"`inner_optimizer` must be a keras.optimizers.Optimizer. Received: {type(inner).__name__}")
    for optimizer in (inner, getattr(inner, "inner_optimizer", None)):
        if hasattr(optimizer, "averaged_parameters"):  # SlowMo itself imports this module
            raise TypeError("`inner_optimizer` is a SlowMo optimizer already. Wrap the optimizer that it wraps.")
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
    resets = config.inner_state == "reset" or config.nonfinite == "exclude"
    if resets and isinstance(inner.innermost, keras.optimizers.ScheduleFreeAdamW):
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
        raise TypeError(f"`variables` must be Keras variables, model.variables. Received: {type(others[0]).__name__}")
    if mapped and model is None:
        raise ValueError("with a parameter_map the layers must be known: call broadcast(model).")


def refuse_strategies() -> None:
    """Refuse a tf.distribute strategy, which makes variables and runs steps in its own ways."""
    if tf.distribute.has_strategy():
        raise ValueError(
            "SlowMo runs one process per device and not under a tf.distribute strategy. Received: "
            f"{type(tf.distribute.get_strategy()).__name__}. Start several workers with horovodrun instead."
        )
