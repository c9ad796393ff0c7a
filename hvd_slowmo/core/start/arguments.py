"""Arguments of SlowMo's constructor: the settings, and the checks that every adapter shares."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from hvd_slowmo.checked_numbers import spell_value
from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.keywords import refuse_unknown
from hvd_slowmo.settings import OTHER_NAMES, SlowMoSettings
from hvd_slowmo.wire.parameter_map import ParameterMap

_UNSCALED = "SlowMo averages without further factors: leave it out."
_MESSAGES = "Messages are stretches of at most 16 MiB already: leave it out."
HOROVODS_ARGUMENTS = {
    "named_parameters": "The model itself brings the names: SlowMo(optimizer, model).",
    "compression": "Outer steps travel in fewer bits with bits=16, 8 or 4, and less often with a larger tau.",
    "op": "Workers are always averaged: leave it out.",
    "backward_passes_per_step": (
        "An inner step is one step of the optimizer, after any number of backward passes: accumulate gradients with "
        "no_sync() in PyTorch, and with gradient_accumulation_steps of the inner optimizer in Keras."
    ),
    "average_aggregated_gradients": (
        "Keras averages the gradients that it accumulates: give the inner optimizer gradient_accumulation_steps."
    ),
    "gradient_predivide_factor": _UNSCALED,
    "scale_local_gradients": _UNSCALED,
    "groups": _MESSAGES,
    "num_groups": _MESSAGES,
    "sparse_as_dense": "Parameters travel, and they are dense: leave it out.",
    "device_dense": "The exchange runs where the parameters are: leave it out.",
    "device_sparse": "The exchange runs where the parameters are: leave it out.",
    "use_locking": "Leave it out.",
}
"""Arguments of hvd.DistributedOptimizer that SlowMo does not share, with the replacement in a sentence."""


def configured(owner: type, config: SlowMoConfig | None, settings: Mapping[str, Any]) -> SlowMoConfig:
    """Return the configuration that a constructor was given, as a whole or as keywords.

    Args:
        owner: the adapter's SlowMo, for the names of its other arguments; not a subclass, which may pass these on.
        config: None for the settings, which may be empty: SlowMoConfig's defaults.
        settings: fields of SlowMoConfig.

    Raises:
        TypeError: both, an unknown keyword, or a config of another type.
        ValueError: as SlowMoConfig.

    Example:
        >>> configured(object, None, {"tau": 4, "beta": 0.25})
        SlowMoConfig(tau=4, alpha=1.0, beta=0.25, nesterov=False, ...
    """
    if unknown := settings.keys() - SlowMoSettings.__annotations__.keys():
        parameters = inspect.signature(owner.__init__).parameters.values()  # type: ignore[misc]  # it is read, not called
        own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        known = [*SlowMoSettings.__annotations__, *own]
        refuse_unknown(owner.__name__, sorted(unknown), known, {**OTHER_NAMES, **HOROVODS_ARGUMENTS})
    if config is None:
        return SlowMoConfig(**settings)
    if not isinstance(config, SlowMoConfig):
        raise TypeError(f"`config` must be a SlowMoConfig. Received: {type(config).__name__}")
    if settings:
        raise TypeError(
            f"give `config` or its fields as keywords, not both. Received: a config and {', '.join(settings)}"
        )
    return config


def check_name(name: object) -> None:
    """Refuse a name that collectives and variables can't have.

    Raises:
        TypeError, ValueError: it is no string, or has other characters.
    """
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a string. Received: {spell_value(name)}")
    if not re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9_.-]*", name):
        raise ValueError(f"`name` may have letters, digits, '_', '.' and '-' only. Received: {name!r}")


def check_parameter_map(parameter_map: object) -> None:
    """Refuse a map of another type with a TypeError."""
    if parameter_map is not None and not isinstance(parameter_map, ParameterMap):
        raise TypeError(f"`parameter_map` must be a ParameterMap. Received: {type(parameter_map).__name__}")


def check_workers(config: SlowMoConfig, comm: Comm | None, **given: object) -> None:
    """Refuse workers that do not fit the settings.

    Args:
        given: the constructor's other arguments that say who trains together, None where they are not given.

    Raises:
        ValueError: workers are given twice, or the workers of each node are missing.
    """
    refuse_both(comm, **given)
    parts = [name for name in ("process_set", "process_group") if given.get(name) is not None]
    if config.gradients == "node" and parts:
        raise ValueError(f"gradients='node' works on all ranks only: give no {parts[0]}.")
    if config.gradients == "node" and comm is not None and comm.size > 1 and comm.node is None:
        raise ValueError("gradients='node' needs the workers of each node. Give a comm that has them as `comm.node`.")


def check_metrics(metrics: bool) -> None:
    """Raise TypeError if `metrics` is no bool."""
    if not isinstance(metrics, bool):
        raise TypeError(f"`metrics` must be True or False. Received: {spell_value(metrics)}")


def refuse_in_elastic_job(config: SlowMoConfig, parameter_map: object, **given: object) -> None:
    """Refuse arguments with which workers can't come and go yet.

    Args:
        parameter_map: the constructor's.
        given: its other arguments that can't be given, None where they are not.

    Raises:
        ValueError: it names the argument.
    """
    reasons = {
        "gradients='node'": config.gradients == "node",
        "a parameter_map with few bits or shard=True": parameter_map is not None and bool(config.sliced_vectors),
        "tau=None with local gradients": config.tau is None and config.gossip is None and config.gradients == "local",
        **{f"a {name}": value is not None for name, value in given.items()},
    }
    for what, used in reasons.items():
        if used:
            raise ValueError(f"an elastic job can't have {what} yet: leave it out, or start the job without elastic.")


def refuse_both(comm: Comm | None, **given: object) -> None:
    """Refuse workers that are given twice with a ValueError."""
    for name, value in given.items():
        if comm is not None and value is not None:
            raise ValueError(f"`comm` and `{name}` both say who trains together. Give one of them.")


def refuse_wrapped(inner: object) -> None:
    """Refuse an inner optimizer that exchanges something with other workers by itself.

    Raises:
        TypeError: it is SlowMo, or Horovod's DistributedOptimizer.
    """
    if hasattr(inner, "averaged_parameters"):  # the adapters' SlowMo classes import this module
        raise TypeError(
            "`inner_optimizer` is a SlowMo optimizer already. Use it as it is, or wrap its inner_optimizer to begin "
            "anew, without momentum."
        )
    if any(_is_horovods(cls) for cls in type(inner).__mro__):
        raise TypeError(
            "`inner_optimizer` is a hvd.DistributedOptimizer, which averages gradients over the workers at every step; "
            "SlowMo would add its outer steps to that traffic. Keep one of the two: give SlowMo the optimizer that "
            "hvd.DistributedOptimizer was given, or use hvd.DistributedOptimizer without SlowMo."
        )


class Outermost:
    """Base of an optimizer around which Horovod puts nothing.

    hvd.DistributedOptimizer makes a subclass of an optimizer's class, with Horovod's own step in place of the
    optimizer's.

    Raises:
        TypeError: Horovod derives a class from this one.

    Example:
        >>> type("SlowMo", (Outermost,), {"__module__": "horovod.torch.optimizer"})
        Traceback (most recent call last):
        TypeError: hvd.DistributedOptimizer can't be put around SlowMo: ...
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if _is_horovods(cls):
            raise TypeError(
                "hvd.DistributedOptimizer can't be put around SlowMo: it would average gradients at every step, which "
                "SlowMo saves. Remove it and use SlowMo alone, or give SlowMo gradients='all' where gradients should "
                "be averaged at every step."
            )


def _is_horovods(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "horovod"
