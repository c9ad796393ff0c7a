"""A worker's own part of every exchange: whether it trains, and at what learning rates."""

from __future__ import annotations

from operator import is_

import numpy as np
from numpy.typing import NDArray
from torch.optim import Optimizer

from hvd_slowmo.checked_numbers import number_or_nan
from hvd_slowmo.core.average.gradient_average import Presence
from hvd_slowmo.core.parts.layout import ParameterGroups
from hvd_slowmo.core.step import refusals


class WorkerPresence:
    """Shared by the optimizer and its gradient hooks, which must not keep the optimizer alive.

    Args:
        inner: the inner optimizer.

    Attributes:
        inner: as given.
        groups: the parameter groups that all workers have in common.
        joining: within join().
        leaving: within join(leaving=True).
        left: ranks that have left for good.
    """

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.groups = ParameterGroups((), ())
        self.joining = False
        self.leaving = False
        self.left: tuple[int, ...] = ()
        self._given: list[float] = []  # the rates last seen, if all were floats
        self._rates: NDArray[np.float64] = np.zeros(0)

    def rates(self) -> NDArray[np.float64]:
        """Return the learning rate of each common group, float64 (G,): NaN for what is no number.

        The same array as before where no rate has changed; not to be written to.
        """
        groups = self.inner.param_groups
        given = [groups[own]["lr"] for own in self.groups.own]
        if len(given) == len(self._given) and all(map(is_, given, self._given)):
            return self._rates
        rates = np.array([number_or_nan(rate) for rate in given])
        if all(type(rate) is float for rate in given):  # and no tensor, which may hold another value in the next step
            self._given, self._rates = given, rates
        return rates

    def now(self) -> Presence:
        """Return this worker's part of an exchange of gradients.

        Raises:
            RuntimeError: some workers have left for good.
        """
        self.refuse_if_left()
        return Presence(int(not self.joining), int(self.leaving), self.rates())

    def refuse_if_left(self) -> None:
        """Raise RuntimeError once some workers have left for good."""
        refusals.refuse_if_left(self.left)
