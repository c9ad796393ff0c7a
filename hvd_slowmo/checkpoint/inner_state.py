"""The base optimizer's buffers where PyTorch and Keras define them alike, and momentum in both of its units.

SGD's momentum is a sum of gradients in PyTorch (b <- mu b + g, x <- x - lr b), and of steps in Keras
(m <- mu m - lr g, x <- x + m): m = -lr b while the rate is constant. Both are stored as they are; whoever reads the
other's multiplies or divides by the learning rate in force. Adam's moments are the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.checkpoint.file import CheckpointError

SGD, ADAM = "sgd", "adam"
ALIKE: dict[str, tuple[str, ...]] = {
    SGD: ("momentum", "velocity"),
    ADAM: ("moment1", "moment2", "moment2_max", "steps"),
}
"""Per kind of optimizer that both frameworks define alike: its buffers. "momentum" is PyTorch's, "velocity" Keras'."""

OTHER = {"momentum": "velocity", "velocity": "momentum"}

Buffers = dict[str, dict[str, NDArray[Any]]]
"""Per buffer, arrays by the adapter's names of the parameters. Those of an alike kind have the parameter's shape,
"steps" are scalars; of any other kind names and shapes are the adapter's own."""


class Carried:
    """What a load had to convert, until the first step makes it another value.

    A conversion rounds. A state that goes to the other framework and back without a step must be the same to the bit,
    so whoever converts keeps what it was given (on the host, of the momentum's size) and gives that back while what it
    made of it has not changed.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, tuple[NDArray[Any], float]] = {}
        self._rates: dict[str, float] = {}

    def forget(self) -> None:
        """Another state takes the place of this one."""
        self._buffers.clear()
        self._rates.clear()

    def taken(self, own: str, given: NDArray[Any], rate: float) -> None:
        """A parameter's momentum that was converted at a rate."""
        self._buffers[own] = (given, rate)

    def taken_rate(self, own: str, rate: float) -> None:
        """The learning rate of a parameter."""
        self._rates[own] = rate

    def rate(self, own: str, rate: float, dtype: np.dtype[Any]) -> float:
        """The learning rate as it was given, if it is still that one.

        Args:
            dtype: in which it is kept here.
        """
        given = self._rates.get(own)
        return rate if given is None or dtype.type(given) != dtype.type(rate) else given

    def buffers(self, form: str, now: Mapping[str, NDArray[Any]]) -> Buffers:
        """Momentum in the form in which it was given where it has not changed since, in its own elsewhere."""
        found: Buffers = {form: {}, OTHER[form]: {}}
        for own, value in now.items():
            given, rate = self._buffers.get(own, (None, 0.0))
            if given is not None and np.array_equal(converted(own, given, form, rate), value):
                found[OTHER[form]][own] = given
            else:
                self._buffers.pop(own, None)
                found[form][own] = value
        return found


def converted(own: str, value: NDArray[Any], form: str, rate: float) -> NDArray[Any]:
    """A momentum in the units of `form`, from the other ones.

    Raises:
        CheckpointError: the rate is 0, which either loses the momentum or can't tell it.
    """
    if not value.any():
        return np.zeros_like(value)
    if rate == 0:
        raise CheckpointError(
            f"the momentum of {own} can't be carried over between PyTorch and Keras at a learning rate of 0: Keras "
            "keeps it times the rate. Save at another step, or where buffers='reset' has begun a block."
        )
    scale = value.dtype.type(rate)
    result: NDArray[Any] = -(value * scale) if form == "velocity" else -(value / scale)
    return result
