"""A line in the log about an outer step now and then, on rank 0."""

from __future__ import annotations

import logging
from collections.abc import Callable

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.schedule import meetings_so_far
from hvd_slowmo.core.start.announcement import size_in_words
from hvd_slowmo.core.step.metrics import Metrics

logger = logging.getLogger("hvd_slowmo")

_FIRST = (1, 2, 5, 10, 20, 50, 100)
_PERIOD = _FIRST[-1]


class OuterStepLog:
    """One worker's lines: for the outer steps 1, 2, 5, 10, 20, 50 and 100, then for every 100th.

    The count follows from the steps, so that two runs have the same lines, and a resumed run goes on counting. Of
    several fragments the last one counts, which completes a block of all parameters.

    Args:
        config: the settings.
    """

    def __init__(self, config: SlowMoConfig) -> None:
        self._config = config
        self._last = 0  # number of the last outer step that was seen
        self._next = 1  # of the one that gets the next line

    def look(self, comm: ScopedComm, steps: Callable[[], int], seen: Callable[[], tuple[int, Metrics | None]]) -> None:
        """Log a line if one has become due since the last look; without a listener this costs next to nothing.

        Args:
            comm: the workers.
            steps: returns the inner steps completed.
            seen: returns the bytes that this worker has sent, and the last measurements; None without any.
        """
        if comm.rank or self._config.tau is None or not logger.isEnabledFor(logging.INFO):
            return
        step = steps()
        number = meetings_so_far(self._config, step)[-1]
        if number < self._last:  # an earlier state was loaded
            self._next = following(number)
        self._last = number
        if number < self._next:
            return
        self._next = following(number)
        sent, metrics = seen()
        traffic = f"; {size_in_words(sent)} sent" if comm.size > 1 else ""
        logger.info("%s: outer step %d, step %d%s%s", comm.name, number, step, traffic, measured(metrics))


def following(number: int) -> int:
    """Return the number of the outer step that gets a line next, after this one.

    Example:
        >>> following(0), following(7), following(100), following(250)
        (1, 10, 200, 300)
    """
    if number >= _PERIOD:
        return (number // _PERIOD + 1) * _PERIOD
    return next(each for each in _FIRST if each > number)


def measured(metrics: Metrics | None) -> str:
    """Return the measurements of an outer step in words, behind a semicolon; nothing without any.

    Example:
        >>> from hvd_slowmo.core.step.metrics import metrics_of
        >>> from hvd_slowmo.core.parts.progress import Observed
        >>> seen = Observed(drift=0, mean=1, divergence=0.002, delta=4, v=1, product=1, residual=0, local=0)
        >>> measured(metrics_of(seen, 24, seconds_waited=0.25, seconds_exchanging=1.0, bytes_sent=4096))
        '; divergence 0.002, norm of Delta 2, of v 1, cosine 0.5, waited 0.25 s'
    """
    if metrics is None:
        return ""
    return (
        f"; divergence {metrics.divergence:.3g}, norm of Delta {metrics.delta_norm:.3g}, of v {metrics.v_norm:.3g}, "
        f"cosine {metrics.cosine:.3g}, waited {metrics.seconds_waited:.3g} s"
    )
