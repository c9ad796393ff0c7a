"""What the state machine needs of an adapter's vectors."""

from __future__ import annotations

from typing import Any, Protocol

from hvd_slowmo.core.layout import Chunk


class Store(Protocol):
    """The adapter's vectors. A tensor that is given or taken is 1-D, of the chunk's length and segment's type."""

    def read(self, vector: str, chunk: Chunk) -> Any:
        """A stretch of "model", "gradient" or a vector that is kept: "anchor", "v", "push" or "sent".

        What "model" and "gradient" give is the caller's own.
        """

    def write(self, vector: str, chunk: Chunk, value: Any) -> None:
        """Set that stretch; value is not kept."""

    def written(self, chunk: Chunk, anchor: Any) -> Any:
        """The anchor as the parameters' own type holds it, in the wire's type; `anchor` itself where that is exact."""

    def zeros(self, chunk: Chunk) -> Any:
        """A tensor of zeros like the chunk's."""

    def present(self) -> Any:
        """A vector of scalars with a 1 for every parameter that has a gradient here, else 0."""

    def admit(self, counts: Any) -> None:
        """How many workers have a gradient for each parameter: where somebody has, those without one have zeros."""

    def finite(self) -> Any:
        """Whether every parameter is finite: a bool scalar. Statistics and masks may hold infinities."""

    def reset_base(self) -> None:
        """Give the base optimizer's buffers their values from before the first step."""
