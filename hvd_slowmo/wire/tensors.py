"""A tensor of the model as it travels, whatever the framework."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from hvd_slowmo.wire.views import Shape, View

Role: TypeAlias = Literal["parameter", "statistic", "optimizer_state", "frozen"]
"""Why a tensor travels.

parameter: it is trained, and takes the outer update.
statistic: a running statistic of the model (BatchNorm's), averaged with the parameters.
optimizer_state: of the inner optimizer, averaged when a block begins (inner_state="average").
frozen: not trained; equal on all workers from the start on, and never averaged.
"""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor on the wire, and how a worker's framework keeps it.

    Attributes:
        name: neutral between frameworks where a `ParameterMap` gives it, "2.conv.weight" (number of the layer among
            those with weights, kind, part); otherwise the framework's own name.
        role: see `Role`.
        shape: on the wire.
        dtype: of the framework's own tensor, by its common name: "float32".
        view: from the own tensor to the wire.
        own: the adapter's name of the tensor: a PyTorch parameter's or buffer's name, a Keras variable's path.
        note: further properties of the layer that must be equal on all workers, "eps 1e-05".

    Example:
        >>> spec = TensorSpec("w", "parameter", (2, 3), "float32", View.same((2, 3)), "weight")
        >>> spec.size, spec.wire_dtype
        (6, 'float32')
    """

    name: str
    role: Role
    shape: Shape
    dtype: str
    view: View
    own: str
    note: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def wire_dtype(self) -> Literal["float32", "float64"]:
        """Type in which the tensor travels, and in which its anchor and v are kept.

        Statistics travel as float64: the mean of equal values is then that value, for masks and position tables too.
        """
        return "float64" if self.role == "statistic" or self.dtype == "float64" else "float32"

    def describe(self) -> list[Any]:
        """Return what must be equal on all workers, in JSON types."""
        return [self.name, self.role, list(self.shape), self.dtype, self.note]


def describe(specs: Sequence[TensorSpec]) -> list[list[Any]]:
    """Return the wire of a model, tensor by tensor: equal on workers that can train together, in any framework.

    Example:
        >>> describe([TensorSpec("w", "parameter", (2,), "float32", View.same((2,)), "weight")])
        [['w', 'parameter', [2], 'float32', '']]
    """
    return [spec.describe() for spec in specs]
