"""The inner optimizer's learning rates, as a step may use them."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.checked_numbers import spell_value
from hvd_slowmo_torch.presence import WorkerPresence

_LARGEST = float(np.finfo(np.float32).max)  # PyTorch refuses greater ones for parameters in float32

logger = logging.getLogger("hvd_slowmo")


class UsableRates:
    """Finds rates that no step can take.

    Such a rate (a text, 1e400) would raise from within the inner optimizer, on this worker alone and while the others
    wait. Such a step is left out, and the others refuse the NaN together when they meet.

    Args:
        presence: of this worker, which reads the rates.
    """

    def __init__(self, presence: WorkerPresence) -> None:
        self._presence = presence
        self._found: NDArray[np.float64] | None = None  # rates that were found usable

    def look(self, worker: str, *, meets: bool) -> tuple[NDArray[np.float64], bool]:
        """Return the rates, and whether a step can be taken with them.

        Args:
            worker: its name, for messages.
            meets: there are others, with whom the worker will meet and compare rates.

        Raises:
            ValueError: a rate is unusable, and nobody else will hear of it.
        """
        rates = self._presence.rates()
        # NumPy takes longer for a few numbers.
        if rates is self._found or all(abs(rate) <= _LARGEST for rate in rates.tolist()):
            self._found = rates
            return rates, True
        unusable = ~(np.abs(rates) <= _LARGEST)
        group = int(self._presence.groups.own[int(unusable.argmax())])
        words = f"no step can be taken with the learning rate of parameter group {group}: it must be a finite number."
        received = spell_value(self._presence.inner.param_groups[group]["lr"])
        if not meets:
            raise ValueError(f"{worker}: {words} Received: lr={received}")
        logger.error("%s: %s Received: lr=%s", worker, words, received)
        return np.where(unusable, np.nan, rates), False
