"""A worker's own part of every exchange: whether it trains, and at what learning rates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch.optim import Optimizer

from hvd_slowmo.checked_numbers import number_or_nan
from hvd_slowmo.core.gradient_average import Presence
from hvd_slowmo.core.layout import ParameterGroups


class WorkerPresence:
    """Shared by the optimizer and its gradient hooks, which must not keep the optimizer alive.

    Args:
        inner: the inner optimizer.

    Attributes:
        groups: the parameter groups that all workers have in common.
        joining: within join().
        leaving: within join(leaving=True).
        left: ranks that have left for good.
    """

    def __init__(self, inner: Optimizer) -> None:
        self._inner = inner
        self.groups = ParameterGroups((), ())
        self.joining = False
        self.leaving = False
        self.left: tuple[int, ...] = ()

    def rates(self) -> NDArray[np.float64]:
        """Return the learning rate of each common group, float64 (G,): NaN for what is no number."""
        return np.array([number_or_nan(self._inner.param_groups[own]["lr"]) for own in self.groups.own])

    def now(self) -> Presence:
        """Return this worker's part of an exchange of gradients.

        Raises:
            RuntimeError: some workers have left for good.
        """
        self.refuse_if_left()
        return Presence(int(not self.joining), int(self.leaving), self.rates())

    def refuse_if_left(self) -> None:
        """Raise RuntimeError once some workers have left for good."""
        if self.left:
            raise RuntimeError(f"ranks {list(self.left)} have left in join(leaving=True): nothing can be averaged.")
