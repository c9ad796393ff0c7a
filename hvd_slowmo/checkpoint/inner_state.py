"""The inner optimizer's state: kinds that PyTorch and Keras define alike, and momentum in the units of both.

SGD's momentum is a sum of gradients in PyTorch (b <- mu b + g, x <- x - lr b), and of steps in Keras
(m <- mu m - lr g, x <- x + m): m = -lr b while the rate is constant. A checkpoint holds either; a reader of the other
multiplies or divides by the learning rate in force. Adam's moments are the same in both.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.errors import CheckpointError

Form: TypeAlias = Literal["momentum", "velocity"]
"""Units of SGD's momentum, and the name of its buffer: "momentum" is PyTorch's, "velocity" Keras'."""

SGD, ADAM = "sgd", "adam"
ALIKE: dict[str, tuple[str, ...]] = {
    SGD: ("momentum", "velocity"),
    ADAM: ("moment1", "moment2", "moment2_max", "steps"),
}
"""The buffers of each kind of optimizer that both frameworks define alike."""

OptimizerState = dict[str, dict[str, NDArray[Any]]]
"""Per buffer, arrays by the adapter's names of the parameters. Those of an alike kind have the parameter's shape, and
"steps" are scalars; of any other kind names and shapes are the adapter's own. `SETTINGS` is no buffer."""

SETTINGS = "settings"
"""Key of the values that an inner optimizer changes elsewhere, by framework: uint8, encoded as the adapter likes."""


@dataclass(frozen=True)
class OptimizerKind:
    """The kind of an inner optimizer, which must be one in a checkpoint and in the worker that loads it.

    Attributes:
        name: one of `ALIKE`, or the framework and the class: only that class can read the state then.
        buffers: of one of an alike kind with these settings, by name.
        form: in which the framework keeps SGD's momentum.

    Example:
        >>> OptimizerKind.sgd("momentum", momentum=True).buffers
        ('momentum',)
        >>> OptimizerKind.other("torch", object()).name
        'torch.object'
    """

    name: str
    buffers: tuple[str, ...] = ()
    form: Form = "momentum"

    @classmethod
    def sgd(cls, form: Form, *, momentum: bool) -> OptimizerKind:
        """Return SGD, with momentum or without."""
        return cls(SGD, (form,) if momentum else (), form)

    @classmethod
    def adam(cls, *, amsgrad: bool) -> OptimizerKind:
        """Return Adam and AdamW."""
        return cls(ADAM, ("moment1", "moment2", "steps", *(("moment2_max",) if amsgrad else ())))

    @classmethod
    def other(cls, framework: str, optimizer: object) -> OptimizerKind:
        """Return the kind of an optimizer that only its own framework has."""
        return cls(f"{framework}.{type(optimizer).__name__}")

    @property
    def alike(self) -> bool:
        """True if both frameworks define it alike."""
        return self.name in ALIKE


def spell_kind(name: str) -> str:
    """Return a kind in words.

    Example:
        >>> spell_kind("adam"), spell_kind("torch.RMSprop")
        ('Adam or AdamW', 'torch.RMSprop')
    """
    return {SGD: "SGD", ADAM: "Adam or AdamW"}.get(name, name)


def check_buffers(saved: Collection[str], kept: Collection[str], parameter: str = "") -> None:
    """Refuse a checkpoint that has other buffers than the inner optimizer keeps.

    Args:
        saved: names of the buffers in the checkpoint.
        kept: names of the buffers here.
        parameter: of which they are, where that matters.

    Raises:
        CheckpointError: they differ.
    """
    if set(saved) != set(kept):
        raise CheckpointError(
            f"the inner optimizer has {', '.join(sorted(saved))}{f' of {parameter}' if parameter else ''} in the "
            f"checkpoint, and keeps {', '.join(sorted(kept)) or 'nothing'} here. Give it the settings of the run that "
            "is resumed (momentum, amsgrad and the like)."
        )


def convert_momentum(parameter: str, value: NDArray[Any], form: Form, rate: float) -> NDArray[Any]:
    """Return a momentum in the units of `form`, from the other ones. The result is rounded.

    Args:
        parameter: its name, for the message.
        rate: learning rate in force.

    Raises:
        CheckpointError: the rate is 0, which either loses the momentum or can't recover it.

    Example:
        >>> convert_momentum("weight", np.array([2.0]), "velocity", rate=0.5)
        array([-1.])
    """
    if not value.any():
        return np.zeros_like(value)
    if rate == 0:
        raise CheckpointError(
            f"the momentum of {parameter} can't be converted between PyTorch and Keras at a learning rate of 0: Keras "
            "keeps it times the rate. Save at another step, or right after an outer step with inner_state='reset'."
        )
    scale = value.dtype.type(rate)
    result: NDArray[Any] = -(value * scale) if form == "velocity" else -(value / scale)
    return result
