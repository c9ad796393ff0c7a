"""Saving at the end that a signal announces."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from hvd_slowmo.checkpoint.job import AnyPath
from hvd_slowmo.checkpoint.periodic import Checkpoints
from hvd_slowmo.core.step import preemption

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def on_preemption(*, save: AnyPath | Checkpoints | None, signals: Sequence[int] = SIGNALS) -> None:
    """Save and end all workers when one of them receives a signal that announces its end.

    Call it on every rank, in the main thread. After the signal the worker finishes its step. At the next point where
    all workers are together (an outer step, a step that averages gradients over all workers, or the end of a join)
    every rank saves and raises SystemExit with status `PREEMPTED`, 75. A second signal, more than a second after the
    first one, ends the process at once. Handlers that were there before are called too, but for Python's own of SIGINT.

    Args:
        save: path of a checkpoint that `optimizer.save` writes, for a job with one optimizer; `Checkpoints`, whose
            `step()` saves then; or None: the signals do again what they did before.
        signals: numbers of the signals: a preemption (SIGTERM), Ctrl-C (SIGINT), SLURM's --signal=USR1@120 (SIGUSR1).

    Raises:
        TypeError: `save` is something else.
        RuntimeError: not in the main thread.

    Example:
        >>> on_preemption(save="last.slowmo")
        >>> on_preemption(save=None)
    """
    if save is not None and not isinstance(save, (str, os.PathLike, Checkpoints)):
        raise TypeError(f"`save` must be a path or Checkpoints. Received: {type(save).__name__}")
    preemption.install(save, signals)
