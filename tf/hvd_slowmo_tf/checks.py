"""What SlowMo refuses when it is constructed."""

from __future__ import annotations

import re
from typing import Any

import keras
import tensorflow as tf

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_tf.inner_optimizer import Inner


def check_inner(inner: Any) -> None:
    """Refuse what is no optimizer to wrap."""
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise TypeError(f"`inner_optimizer` must be a keras.optimizers.Optimizer. Received: {type(inner).__name__}")
    wrapped = getattr(inner, "inner_optimizer", None)
    for optimizer in (inner, wrapped):
        if hasattr(optimizer, "averaged_parameters"):  # SlowMo itself imports this module
            raise TypeError("`inner_optimizer` is a SlowMo optimizer already. Wrap the optimizer that it wraps.")
        if isinstance(optimizer, keras.optimizers.MultiOptimizer):
            raise TypeError(
                "`inner_optimizer` is a MultiOptimizer, which has a learning rate for each of its optimizers. SlowMo "
                "has one for all variables: use one SlowMo with a name of its own for each set of variables, in a loop "
                "of your own."
            )


def check_together(inner: Inner, config: SlowMoConfig, parameter_map: ParameterMap | None) -> None:
    """Refuse what this optimizer can't do."""
    if parameter_map is not None and inner.taken["use_ema"]:
        raise ValueError(
            "use_ema keeps a moving average that the workers average too, and other frameworks have none: it can't be "
            "used with a parameter_map."
        )
    resets = config.buffers == "reset" or config.nonfinite == "exclude"
    if resets and isinstance(inner.innermost, keras.optimizers.ScheduleFreeAdamW):
        raise ValueError(
            "ScheduleFreeAdamW keeps parameters among its buffers: they can't be reset, as buffers='reset' and "
            "nonfinite='exclude' do. Use buffers='average'."
        )


def check_settings(config: Any, name: Any, process_set: Any, parameter_map: Any) -> None:
    """Refuse arguments that are something else altogether, and what can't work together."""
    if not isinstance(config, SlowMoConfig):
        raise TypeError(f"`config` must be a SlowMoConfig. Received: {type(config).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a string. Received: {name!r}")
    if not re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9_.-]*", name):
        raise ValueError(f"`name` may have letters, digits, '_', '.' and '-' only. Received: {name!r}")
    if parameter_map is not None and not isinstance(parameter_map, ParameterMap):
        raise TypeError(f"`parameter_map` must be a ParameterMap. Received: {type(parameter_map).__name__}")
    if config.gradients == "node" and process_set is not None:
        raise ValueError("gradients='node' works on all ranks only: give no process_set.")
    refuse_strategies()


def refuse_strategies() -> None:
    """A tf.distribute strategy has ways of its own to make variables and to run a step."""
    if tf.distribute.has_strategy():
        raise ValueError(
            "SlowMo runs one process per device and not under a tf.distribute strategy. Received: "
            f"{type(tf.distribute.get_strategy()).__name__}. Start several workers with horovodrun instead."
        )
