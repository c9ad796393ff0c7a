"""The tensors of a model as they travel, whatever the framework."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hvd_slowmo.wire.views import Shape, View


@dataclass(frozen=True)
class WireEntry:
    """One tensor on the wire, and where a worker's framework keeps it.

    name: neutral, for example "2.conv.weight": number of the layer among those with weights, kind, role.
    rule: "slow" for trained parameters, "mean" for BatchNorm's moving statistics, "frozen" for what is not trained: it
        is the same on all workers from the start on, and never averaged.
    dtype: the own tensor's, by its common name: "float32".
    own: the adapter's name of the tensor: a PyTorch parameter's or buffer's name, a Keras variable's path.
    note: what else the layers must have in common, for example "eps 1e-05".
    """

    name: str
    rule: str
    shape: Shape
    dtype: str
    view: View
    own: str
    note: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def describe(self) -> list[Any]:
        """What must be equal on all workers, in JSON types."""
        return [self.name, self.rule, list(self.shape), self.dtype, self.note]


def describe(entries: Sequence[WireEntry]) -> list[list[Any]]:
    """The wire of a model, entry by entry: equal on workers that can train together, whatever their frameworks."""
    return [entry.describe() for entry in entries]
