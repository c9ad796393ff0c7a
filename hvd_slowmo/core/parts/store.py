"""Store and GradientSource: what the state machine needs of an adapter's tensors."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from hvd_slowmo.core.parts.layout import Chunk, Stretch
from hvd_slowmo.core.parts.progress import Scalar, Vector


class Condition(NamedTuple):
    """The state in which a worker's model comes to a meeting."""

    misfit: Scalar  # 0, or 1 + the number in the layout of a tensor that has changed its form; -1: a new tensor
    entered: Scalar  # 1: values have come from outside since the workers were last equal: no step made them
    moved: Vector  # a 1 for each parameter that may have changed since the last meeting, else 0
    name: str = ""  # of a tensor at fault, for this worker's own message


class Store(Protocol):
    """The adapter's vectors. A tensor that is given or taken is 1-D, of the stretch's length and its segment's type."""

    def read(self, vector: str, stretch: Stretch) -> Any:
        """Return a stretch of "model", or of a vector that is kept.

        These are "anchor", "v", "residual", "push", "sent" and "in_flight". A stretch of "model" is a copy. Its memory
        is used again by the second next read of the same type and device, so that at most two chunks of it are in
        flight at a time; a kept vector's is the vector's own.
        """

    def write(self, vector: str, stretch: Stretch, value: Any) -> None:
        """Set that stretch; `value` is not kept."""

    def read_slice(self, vector: str, chunk: int) -> Any:
        """Return this worker's slice of a chunk, of a vector that is kept in slices: "slice_residual", "v", "anchor".

        Its length is that of `hvd_slowmo.core.parts.slices.OwnSlices.lengths`.
        """

    def write_slice(self, vector: str, chunk: int, value: Any) -> None:
        """Set this worker's slice of a chunk; `value` may be kept."""

    def set_aside(self, chunk: Chunk, zeros: bool = False) -> None:
        """Copy a chunk of "model", or zeros, to "in_flight", where it is until `drop`."""

    def drop(self, chunk: Chunk) -> None:
        """Free a chunk of "in_flight"."""

    def as_stored(self, stretch: Stretch, anchor: Any) -> Any:
        """Return the anchor as the parameters' own type holds it, in the wire's type; `anchor` itself where exact."""

    def zeros(self, stretch: Stretch) -> Any:
        """Return zeros like the stretch's."""

    def finite(self, vector: str, fragment: int | None) -> Scalar:
        """Return whether a fragment is finite: its parameters, BatchNorm's statistics, inner state that is averaged.

        A bool scalar. Other buffers are not looked at: masks may hold infinities.

        Args:
            vector: "model" or "in_flight".
            fragment: None for all of the model, without the inner state, which is averaged with a fragment only.
        """

    def condition(self, fragment: int | None) -> Condition:
        """Compare the model with the layout and with its state after the fragment's last meeting.

        Nothing is read before that.

        Args:
            fragment: None for all.
        """

    def mark_block(self, fragment: int | None) -> None:
        """Begin a new block of a fragment: its next `condition` looks back to here. None for all."""

    def unmark_block(self, fragment: int) -> None:
        """Take `mark_block` back: nothing has come of the meeting, and the block goes on."""

    def sent_condition(self, fragment: int) -> Condition:
        """Return the condition in which a fragment was sent that is in flight."""

    def hold(self, moved: Vector) -> None:
        """Leave alone the parameters for which this is 0, the number of workers that have moved them.

        They are frozen and equal everywhere, and a mean would be equal to them up to rounding only.
        """

    def settle(self, fragment: int | None = None, equal: bool = False) -> None:
        """Note the model's state at the end of a meeting.

        Parameters that are held begin anew: the anchor at their value, without momentum.

        Args:
            fragment: that has met; None for all.
            equal: the workers have just become equal, and no step follows at once: values that differ when the next
                one begins come from outside.
        """

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

    def misfit(self) -> Scalar:
        """Return 0, or 1 + the number in the layout of a parameter of another form; its chunk was read as zeros."""

    def entered(self) -> Scalar:
        """Return 1 if values have come from outside since the workers were last equal; once for all exchanges."""

    def admit(self, counts: Vector) -> None:
        """Take the number of workers that have a gradient for each parameter: where one has, all get the mean."""
