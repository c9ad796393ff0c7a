"""Store and GradientSource: what the state machine needs of an adapter's tensors."""

from __future__ import annotations

from typing import Any, Protocol

from hvd_slowmo.core.layout import Chunk, Stretch
from hvd_slowmo.core.progress import Scalar, Vector


class Store(Protocol):
    """The adapter's vectors. A tensor that is given or taken is 1-D, of the stretch's length and its segment's type."""

    def read(self, vector: str, stretch: Stretch) -> Any:
        """Return a stretch of "model", or of a vector that is kept: "anchor", "v", "push" or "sent".

        A stretch of "model" is a copy. Its memory is used again by the second next read of the same type and device, so
        that at most two chunks of it are in flight at a time; a kept vector's is the vector's own.
        """

    def write(self, vector: str, stretch: Stretch, value: Any) -> None:
        """Set that stretch; `value` is not kept."""

    def written(self, stretch: Stretch, anchor: Any) -> Any:
        """Return the anchor as the parameters' own type holds it, in the wire's type; `anchor` itself where exact."""

    def zeros(self, chunk: Chunk) -> Any:
        """Return zeros like the chunk's."""

    def finite(self) -> Scalar:
        """Return whether every parameter is finite: a bool scalar. Statistics and masks may hold infinities."""

    def reset_inner_state(self) -> None:
        """Give the inner optimizer's state its values from before the first step."""


class GradientSource(Protocol):
    """One step's gradients, of which the mean is taken."""

    def read(self, chunk: Chunk) -> Any:
        """Return a chunk of the gradients, zeros where a parameter has none; it is not reused before `write`."""

    def write(self, chunk: Chunk, mean: Any) -> None:
        """Set a chunk of the gradients."""

    def present(self) -> Vector:
        """Return a vector of scalars with a 1 for every parameter that has a gradient here, else 0."""

    def admit(self, counts: Vector) -> None:
        """Take the number of workers that have a gradient for each parameter: where one has, all get the mean."""
