"""Horovod's autotuning, which changes what is promised: a warning, once in a process."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping

logger = logging.getLogger("hvd_slowmo")

VARIABLE = "HOROVOD_AUTOTUNE"

_told = False


def autotuned(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether Horovod tunes its settings while the job trains, as it reads the variable: as an integer.

    Example:
        >>> autotuned({"HOROVOD_AUTOTUNE": "1"}), autotuned({"HOROVOD_AUTOTUNE": "0"}), autotuned({})
        (True, False, False)
    """
    number = re.match(r"\s*\+?(\d+)", environment.get(VARIABLE, ""))
    return number is not None and int(number[1]) > 0


def warn_of_autotuning(rank: int) -> None:
    """Log a warning on rank 0 the first time, if Horovod tunes its settings.

    Args:
        rank: of this worker.
    """
    global _told
    if rank or _told or not autotuned():
        return
    _told = True
    logger.warning(
        "Horovod tries other settings of its own while the job trains (%s=%s). Until it has decided, each message may "
        "wait up to 100 ms, and where gradients are averaged or NCCL sums, a resume may differ from the uninterrupted "
        "run in the last bits. Start the job with --no-autotune, or remove the variable.",
        VARIABLE,
        os.environ[VARIABLE],
    )
