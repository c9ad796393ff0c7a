"""The core's vectors on stacked tensors: read as a column per worker, written to all workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.optim import Optimizer

from hvd_slowmo.core.parts.layout import Chunk, Segment, Stretch
from hvd_slowmo.core.parts.progress import Vector
from hvd_slowmo.core.parts.slices import OwnSlices
from hvd_slowmo.core.parts.store import Condition
from hvd_slowmo_torch.inner import inner_optimizer as inner_state
from hvd_slowmo_torch.model.layout import TorchLayout
from hvd_slowmo_torch.model.pieces import Pieces
from hvd_slowmo_torch.simulator.stack import mean_of

Value = Callable[[torch.Tensor], torch.Tensor | None]
"""Returns a value of a tensor; None where it has none."""

_PER_WORKER = ("push", "sent", "residual")
"""Vectors of which each worker has its own; anchor and v are common, but without the average."""


class Columns:
    """Copies stretches of stacked tensors into stacks and back; see `hvd_slowmo_torch.simulator.stack`.

    Args:
        layout: of one worker's model, whose refs find stacked tensors: (m, *shape), or one for all workers.
        workers: m.
    """

    def __init__(self, layout: TorchLayout, workers: int) -> None:
        self._layout = layout
        self._pieces = Pieces(layout)
        self._workers = workers

    def gather(self, stretch: Stretch, value: Value, flat: torch.Tensor | None = None) -> torch.Tensor:
        """Return a stack (n, m) with a value of each tensor under a stretch, zeros where it has none.

        Args:
            flat: memory for it, at least as long; None for new memory.
        """
        length = self._workers * stretch.size
        flat = self.memory(stretch, length) if flat is None else flat
        stack = flat[:length].view(self._workers, stretch.size)
        for tensor, target, part in self._parts(stretch, value):
            stack[:, part] = 0 if tensor is None else tensor[:, target]
        return stack.T

    def memory(self, stretch: Stretch, length: int) -> torch.Tensor:
        """Return new memory of a stretch's type on its device."""
        segment = self._layout.layout.segments[stretch.segment]
        return torch.empty(length, dtype=getattr(torch, segment.dtype), device=segment.device)

    def scatter(self, stretch: Stretch, stack: torch.Tensor, target_of: Value) -> None:
        """Copy a stack, (n, m) or (n, 1), into a target for each tensor under a stretch, where it has one."""
        for tensor, target, part in self._parts(stretch, target_of):
            if tensor is not None:
                source = stack[part].T
                tensor[:, target] = source if tensor.is_floating_point() else source.round().to(tensor.dtype)

    def _parts(self, stretch: Stretch, value: Value) -> Iterator[tuple[torch.Tensor | None, slice, slice]]:
        """Yield the values under a stretch as a row per worker, the part of a row, and its place in the stretch."""
        spans = self._layout.layout.spans(stretch)
        refs = self._layout.refs[stretch.segment]
        for (tensor, start, stop, at), (number, *_) in zip(self._pieces.under(stretch), spans, strict=True):
            found = value(tensor)
            rows = None if found is None else found.view(-1, refs[number].spec.size)
            yield rows, slice(start, stop), slice(at, at + stop - start)


class StackStore:
    """`hvd_slowmo.core.parts.store.Store` on stacked tensors.

    Values never come from outside, and no parameter changes its form: a simulation owns its tensors.

    Args:
        layout: see `Columns`.
        workers: number of workers.
        inner: the inner optimizer over the stacked parameters.
        names: of the vectors that are kept beside the model.
        own: the slices, of the workers together.
        average: the outer step starts from the workers' mean, so that anchor and v are common.
    """

    def __init__(
        self,
        layout: TorchLayout,
        workers: int,
        inner: Optimizer,
        *,
        names: Sequence[str],
        own: OwnSlices,
        average: bool,
    ) -> None:
        self._layout, self._refs = layout.layout, layout.refs
        self._inner = inner
        self._columns = Columns(layout, workers)
        self._slices = {
            name: {chunk: zeros_of(self._segment_of(chunk), 1, length).T for chunk, length in lengths.items()}
            for name, lengths in own.allocations().items()
        }
        self._vectors = {
            name: {
                number: zeros_of(segment, workers if name in _PER_WORKER or not average else 1, segment.size)
                for number, segment in enumerate(self._layout.segments)
                if segment.role == "parameter"
            }
            for name in names
        }
        self._in_flight: dict[int, torch.Tensor] = {}  # by chunk
        self._workers = workers
        self._turns = {chunk.index: turn for turn, chunk in enumerate(self._layout.in_turn)}
        self._staging: dict[tuple[str, str, int], torch.Tensor] = {}

    def read(self, vector: str, stretch: Stretch) -> torch.Tensor:
        if vector == "model":
            return self._columns.gather(stretch, torch.Tensor.detach, self._staged(stretch))
        if vector == "in_flight":
            start = stretch.start - self._layout.chunks[stretch.index].start
            return self._in_flight[stretch.index][start : start + stretch.size]
        return self._vectors[vector][stretch.segment][:, stretch.start : stretch.stop].T

    def write(self, vector: str, stretch: Stretch, value: torch.Tensor) -> None:
        if vector == "model":
            self._columns.scatter(stretch, value, torch.Tensor.detach)
            return
        kept = self.read(vector, stretch)
        if kept.data_ptr() != value.data_ptr():  # updated in place otherwise
            # A common vector is set to the model only where all workers have just become equal.
            kept.copy_(value if value.shape[1] == 1 or kept.shape[1] > 1 else mean_of(value))

    def read_slice(self, vector: str, chunk: int) -> torch.Tensor:
        return self._slices[vector][chunk]

    def write_slice(self, vector: str, chunk: int, value: torch.Tensor) -> None:
        self._slices[vector][chunk].copy_(value)

    def set_aside(self, chunk: Chunk, zeros: bool = False) -> None:
        self._in_flight[chunk.index] = self._columns.gather(chunk, torch.Tensor.detach)

    def drop(self, chunk: Chunk) -> None:
        del self._in_flight[chunk.index]

    def as_stored(self, stretch: Stretch, anchor: torch.Tensor) -> torch.Tensor:
        own = getattr(torch, self._layout.segments[stretch.segment].tensors[0].dtype)
        return anchor if own == anchor.dtype else anchor.to(own).to(anchor.dtype)

    def zeros(self, stretch: Stretch) -> torch.Tensor:
        return zeros_of(self._layout.segments[stretch.segment], 1, stretch.size).T

    def finite(self, vector: str, fragment: int | None) -> bool:
        return not self.broken(vector, fragment)

    def broken(self, vector: str = "model", fragment: int | None = None) -> list[int]:
        """Return the workers of which a value is not finite that must be; see `Store.finite`."""
        broken: set[int] = set()
        for chunk in self._layout.chunks:
            if fragment not in (None, chunk.fragment) or (fragment is None and chunk.role == "optimizer_state"):
                continue
            refs = self._refs[chunk.segment]
            stack = self.read(vector if chunk.role == "parameter" else "model", chunk)
            for number, start, stop, at in self._layout.spans(chunk):
                if chunk.role != "statistic" or refs[number].watched:
                    finite = stack[at : at + stop - start].isfinite().all(dim=0)
                    broken.update((~finite).nonzero().flatten().tolist())
        return sorted(broken)

    def condition(self, fragment: int | None) -> Condition:
        return Condition(misfit=0, entered=0, moved=[1.0] * len(self._layout.groups))

    def sent_condition(self, fragment: int) -> Condition:
        return self.condition(fragment)

    def mark_block(self, fragment: int | None) -> None:
        """Do nothing: no values come from outside."""

    def unmark_block(self, fragment: int) -> None:
        """Do nothing: no values come from outside."""

    def hold(self, moved: Vector) -> None:
        """Do nothing: frozen parameters are not in the stack."""

    def settle(self, fragment: int | None = None, equal: bool = False) -> None:
        """Do nothing: no values come from outside."""

    def reset_inner_state(self) -> None:
        inner_state.reset(self._inner)

    def _staged(self, stretch: Stretch) -> torch.Tensor:
        """Return memory for a stretch, used again by the second next read: new memory takes longer than the copy."""
        segment, length = self._layout.segments[stretch.segment], self._workers * stretch.size
        key = segment.dtype, segment.device, self._turns[stretch.index] % 2
        if key not in self._staging or len(self._staging[key]) < length:
            self._staging[key] = self._columns.memory(stretch, length)
        return self._staging[key]

    def _segment_of(self, chunk: int) -> Segment:
        return self._layout.segments[self._layout.chunks[chunk].segment]


class StackGradients:
    """`hvd_slowmo.core.parts.store.GradientSource` on the `grad` of stacked parameters.

    Args:
        layout, workers: see `Columns`.
    """

    def __init__(self, layout: TorchLayout, workers: int) -> None:
        self._columns = Columns(layout, workers)
        self._parameters = layout.refs_of("parameter")

    def read(self, chunk: Chunk) -> torch.Tensor:
        return self._columns.gather(chunk, lambda parameter: parameter.grad)

    def write(self, chunk: Chunk, mean: torch.Tensor) -> None:
        self._columns.scatter(chunk, mean, lambda parameter: parameter.grad)

    def present(self) -> list[float]:
        return [0.0 if ref.find().grad is None else 1.0 for ref in self._parameters]

    def misfit(self) -> int:
        return 0

    def entered(self) -> int:
        return 0

    def admit(self, counts: Vector) -> None:
        """Do nothing: one backward makes the gradients of all workers."""


def zeros_of(segment: Segment, rows: int, size: int) -> torch.Tensor:
    """Return zeros (rows, size) of a segment's type on its device."""
    return torch.zeros(rows, size, dtype=getattr(torch, segment.dtype), device=segment.device)
