"""The time limit of an exchange, which the transport itself keeps."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, MutableMapping

from hvd_slowmo.checked_numbers import number_or_nan, spell_value
from hvd_slowmo.comm.launcher import elastic

VARIABLE = "HVD_SLOWMO_TIMEOUT"
"""Environment variable: seconds that the others wait for a worker; 0 for no limit."""

ELASTIC_S = 300.0
"""The limit of elastic jobs, which go on without the worker, where none is given."""

_GLOO_S = 30.0  # Horovod's limit for the replies of a worker's communication thread
_LONGEST_CHECK_S = 60.0
_SHUTDOWN = "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"
_DISABLE = "HOROVOD_STALL_CHECK_DISABLE"


def time_limit(timeout: float | None = None, environment: Mapping[str, str] = os.environ) -> float | None:
    """Return the seconds that the others wait for a worker; None for as long as it takes.

    Args:
        timeout: the user's; None for that of the environment.

    Raises:
        TypeError, ValueError: it is no number of at least one second.

    Example:
        >>> time_limit(30), time_limit(None, {"HVD_SLOWMO_TIMEOUT": "600"}), time_limit(None, {})
        (30.0, 600.0, None)
    """
    if timeout is None:
        given = environment.get(VARIABLE)
        if given is None:
            own = any(name in environment for name in (_SHUTDOWN, _DISABLE))  # the user's for Horovod
            return ELASTIC_S if elastic(environment) and not own else None
        try:
            seconds = float(given)
        except ValueError:
            raise ValueError(f"{VARIABLE} must be a number of seconds. Received: {spell_value(given)}") from None
        if seconds == 0:
            return None
        name, received = VARIABLE, given
    else:
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise TypeError(f"`timeout` must be a number of seconds, or None. Received: {spell_value(timeout)}")
        seconds, name, received = number_or_nan(timeout), "`timeout`", spell_value(timeout)
    if not (math.isfinite(seconds) and seconds >= 1):
        raise ValueError(f"{name} must be at least 1 second. Received: {received}")
    return seconds


def limit_horovod(limit: float, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables from which Horovod takes the limit when it is initialized.

    Its coordinator looks from time to time for tensors that some ranks have submitted and others have not. Longer than
    the limit, it shuts all ranks down. The communication threads of all ranks answer each other meanwhile, except on a
    machine that swaps or a process that is stopped: their limit is no shorter.

    Args:
        limit: seconds.

    Example:
        >>> environment = {}
        >>> limit_horovod(120, environment)
        >>> environment["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"], environment["HOROVOD_STALL_CHECK_TIME_SECONDS"]
        ('120', '30')
    """
    check = max(1, min(_LONGEST_CHECK_S, limit // 4))
    gloo = max(_GLOO_S, limit, as_horovod_reads(environment.get("HOROVOD_GLOO_TIMEOUT_SECONDS", "")))
    environment[_DISABLE] = "0"
    environment["HOROVOD_STALL_CHECK_TIME_SECONDS"] = str(int(check))
    environment[_SHUTDOWN] = str(math.ceil(limit))
    environment["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(math.ceil(gloo))


def horovods_limit(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return the seconds after which Horovod, as it was initialized, shuts all ranks down; None for never.

    Example:
        >>> horovods_limit({"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "120"}), horovods_limit({})
        (120.0, None)
    """
    return as_horovod_reads(environment.get(_SHUTDOWN, "")) or None


def as_horovod_reads(text: str) -> float:
    """Return the integer that a text begins with, at least 0, as C's strtol does; 0 without one.

    Example:
        >>> as_horovod_reads("120"), as_horovod_reads("2 minutes"), as_horovod_reads("soon")
        (120.0, 2.0, 0.0)
    """
    found = re.match(r"\s*\+?(\d{1,9})", text, re.ASCII)  # 30 years are for ever
    return float(found[1]) if found else 0.0
