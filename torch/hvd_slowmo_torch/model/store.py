"""The core's vectors on PyTorch: the model's own tensors, gathered into flat chunks and scattered back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.optim import Optimizer

from hvd_slowmo.core.parts.layout import Chunk, Segment, Stretch
from hvd_slowmo.core.parts.progress import Vector
from hvd_slowmo.core.parts.slices import OwnSlices
from hvd_slowmo.core.parts.store import Condition
from hvd_slowmo_torch.inner import inner_optimizer as inner_state
from hvd_slowmo_torch.model.layout import TensorRef, TorchLayout
from hvd_slowmo_torch.model.pieces import Pieces, zeros_of
from hvd_slowmo_torch.model.spectral import Estimate, restore_length
from hvd_slowmo_torch.model.watch import ModelWatch


class TorchStore:
    """`hvd_slowmo.core.parts.store.Store` on PyTorch tensors. Call it under torch.no_grad().

    Args:
        layout: of the model.
        inner: the inner optimizer.
        names: of the vectors that are kept beside the model.
        buffers: returns the names of the model's floating-point buffers.
        own: the worker's slices; None: nothing is kept in slices.
        on_host: keep anchor, momentum and residuals in host memory.

    Attributes:
        watch: of the model.
        vectors: per name, a flat tensor for each segment of parameters; None for the others, and where `slices` has it.
        slices: per name and chunk, this worker's slice of a vector.
        former_slices: those of former workers, until they have been dealt anew; None else.
        in_flight: by chunk, the values that were sent and whose mean has not been applied.
    """

    def __init__(
        self,
        layout: TorchLayout,
        inner: Optimizer,
        names: Sequence[str],
        buffers: Callable[[], set[str]],
        own: OwnSlices | None = None,
        on_host: bool = False,
    ) -> None:
        self.layout = layout.layout
        self.watch = ModelWatch(layout, buffers)
        self._inner = inner
        self._pieces = Pieces(layout)
        self._watched = [
            *layout.refs_of("parameter"),
            *(ref for ref in layout.refs_of("statistic") if ref.watched),
        ]
        self._inner_state = layout.refs_of("optimizer_state")  # where it is averaged
        self._refs = layout.refs
        self._on_host = on_host
        self._own: OwnSlices | None = None
        self.former_slices: tuple[OwnSlices, dict[str, dict[int, torch.Tensor]]] | None = None
        self.divide(own)
        self.vectors: dict[str, list[torch.Tensor | None]] = {}
        self.keep(names)
        self.in_flight: dict[int, torch.Tensor] = {}
        self._turns = {chunk.index: turn for turn, chunk in enumerate(self.layout.in_turn)}
        self._staging: dict[tuple[str, str, int], torch.Tensor] = {}
        # By chunk, the vectors of length 1 that end in it: its mean completes theirs.
        self._units: dict[int, list[TensorRef]] = {}
        self._counts: dict[int, list[TensorRef]] = {}
        for chunk in self.layout.chunks:
            refs, spans = layout.refs[chunk.segment], list(self.layout.spans(chunk))
            ended = [refs[n] for n, _, stop, _ in spans if refs[n].unit and stop == refs[n].spec.size]
            self._units.update({chunk.index: ended} if ended else {})
            counts = [refs[n] for n, *_ in spans if refs[n].count]
            self._counts.update({chunk.index: counts} if counts else {})
        self._noise: list[Estimate] = []  # of the pairs whose mean has to be replaced

    def divide(self, own: OwnSlices | None) -> None:
        """Make room for the worker's slices, with zeros. Those that it had are kept until they are forgotten."""
        if self._own is not None and self.former_slices is None:
            self.former_slices = self._own, self.slices
        self._own = own
        self.slices: dict[str, dict[int, torch.Tensor]] = {
            name: {chunk: zeros_of(self.segment_of(chunk), length, self._on_host) for chunk, length in lengths.items()}
            for name, lengths in ({} if own is None else own.allocations()).items()
        }

    @property
    def owner(self) -> tuple[int, int]:
        """Rank and number of workers to which the slices belong, or belonged before they are dealt anew."""
        own = self._own if self.former_slices is None else self.former_slices[0]
        assert own is not None, "made with slices"
        return own.rank, own.size

    def keep(self, names: Sequence[str]) -> None:
        """Keep the vectors with these names, zeros where they are new."""
        self.vectors = {name: self.vectors.get(name) or self._zeros_of(name) for name in names}

    def _zeros_of(self, name: str) -> list[torch.Tensor | None]:
        on_host = self._on_host and name in ("anchor", "v", "residual")
        return [
            zeros_of(s, s.size, on_host) if s.role == "parameter" and not (s.sliced and name in self.slices) else None
            for s in self.layout.segments
        ]

    def read(self, vector: str, stretch: Stretch) -> torch.Tensor:
        if vector in self.vectors:
            # Of one in host memory a copy, for which the host does not wait.
            return self._flat(vector, stretch).to(self.layout.segments[stretch.segment].device, non_blocking=True)
        if vector == "in_flight":
            return self._flat(vector, stretch)
        if not self.watch.fits:
            return self._stage(stretch).zero_()
        return self._pieces.gather(stretch, self._stage(stretch), torch.Tensor.detach)

    def write(self, vector: str, stretch: Stretch, value: torch.Tensor) -> None:
        if vector != "model":
            flat = self._flat(vector, stretch)
            if flat.data_ptr() != value.data_ptr():  # updated in place otherwise
                flat.copy_(value)
        elif stretch.role == "parameter":
            if self.watch.fits:
                self._pieces.scatter(stretch, value, self._unheld)
        else:
            self._begin_inner_state(stretch, value)
            self._pieces.scatter(stretch, value, torch.Tensor.detach)
            for ref in self._counts.get(stretch.index, ()):
                ref.find().detach().round_()
            for ref in self._units.get(stretch.index, ()):
                if restore_length(ref.find().detach()) and ref.unit is not None:
                    self._noise.append(ref.unit)
            if stretch.index == max(self._units, default=None):  # both vectors of a pair are written by now
                for estimate in self._noise:
                    estimate()
                self._noise.clear()

    def _begin_inner_state(self, stretch: Stretch, mean: torch.Tensor) -> None:
        """Make the inner state that this worker lacks and another one has.

        Where none has any the mean is zeros: the optimizer makes its own, which may begin with other values.
        """
        if stretch.role != "optimizer_state":
            return
        spans = [
            (self._refs[stretch.segment][number], stop - start, at)
            for number, start, stop, at in self.layout.spans(stretch)
        ]
        missing = [(ref, mean[at : at + length]) for ref, length, at in spans if ref.missing()]
        if missing:
            found = torch.stack([values.any() for _, values in missing]).tolist()  # a device is waited for once
            for (ref, _), there in zip(missing, found, strict=True):
                if there:
                    ref.begin()

    def read_slice(self, vector: str, chunk: int) -> torch.Tensor:
        return self.slices[vector][chunk].to(self.segment_of(chunk).device, non_blocking=True)

    def write_slice(self, vector: str, chunk: int, value: torch.Tensor) -> None:
        self.slices[vector][chunk].copy_(value)

    def set_aside(self, chunk: Chunk, zeros: bool = False) -> None:
        segment = self.layout.segments[chunk.segment]
        flat = torch.empty(chunk.size, dtype=getattr(torch, segment.dtype), device=segment.device)
        self.in_flight[chunk.index] = flat.zero_() if zeros else self._pieces.gather(chunk, flat, torch.Tensor.detach)

    def drop(self, chunk: Chunk) -> None:
        del self.in_flight[chunk.index]

    def segment_of(self, chunk: int) -> Segment:
        """Return the segment of a chunk."""
        return self.layout.segments[self.layout.chunks[chunk].segment]

    def whole_in_flight(self, segment: int) -> torch.Tensor:
        """Return a segment of "in_flight", zeros where nothing is."""
        whole = zeros_of(self.layout.segments[segment], self.layout.segments[segment].size)
        for chunk in self.layout.chunks:
            if chunk.segment == segment and chunk.index in self.in_flight:
                whole[chunk.start : chunk.stop] = self.in_flight[chunk.index]
        return whole

    def as_stored(self, stretch: Stretch, anchor: torch.Tensor) -> torch.Tensor:
        own = getattr(torch, self.layout.segments[stretch.segment].tensors[0].dtype)
        return anchor if own == anchor.dtype else anchor.to(own).to(anchor.dtype)

    def zeros(self, stretch: Stretch) -> torch.Tensor:
        return self._stage(stretch).zero_()  # in place of the stretch that would be read there

    def finite(self, vector: str, fragment: int | None) -> bool:
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for tensor in self._checked(vector, fragment):
            by_device.setdefault(tensor.device, []).append(tensor)
        for tensors in by_device.values():
            # A finite norm has finite parts only, and costs a tenth of looking at each. Another may have overflowed.
            norms = torch.stack([norm.float() for norm in torch._foreach_norm(tensors)])
            if not bool(norms.isfinite().all()) and not all(bool(p.isfinite().all()) for p in tensors):
                return False
        return True

    def _checked(self, vector: str, fragment: int | None) -> Iterator[torch.Tensor]:
        """Yield the values that must be finite. None lie in memory that a later one takes."""
        if vector == "model" and (fragment is None or self.layout.fragments == 1):
            yield from (ref.find().detach() for ref in self._watched)
            if fragment is not None:
                yield from (ref.find().detach() for ref in self._inner_state if not ref.missing())
            return
        for chunk in self.layout.chunks:
            if fragment not in (None, chunk.fragment):
                continue
            for number, start, stop, at in self.layout.spans(chunk):
                ref = self._refs[chunk.segment][number]
                if (chunk.role == "statistic" and not ref.watched) or ref.missing():
                    continue
                if vector == "model":
                    yield ref.find().detach().reshape(-1)[start + ref.offset : stop + ref.offset]
                else:
                    yield self.read(vector, chunk)[at : at + stop - start]

    def condition(self, fragment: int | None) -> Condition:
        return self.watch.condition(fragment)

    def mark_block(self, fragment: int | None) -> None:
        self.watch.mark_block(fragment)

    def unmark_block(self, fragment: int) -> None:
        self.watch.unmark_block(fragment)

    def sent_condition(self, fragment: int) -> Condition:
        return self.watch.sent_condition(fragment)

    def hold(self, moved: Vector) -> None:
        self.watch.hold(moved)

    def settle(self, fragment: int | None = None, equal: bool = False) -> None:
        for chunk in self.layout.parameter_chunks if self.watch.held else ():
            if fragment in (None, chunk.fragment):
                for parameter, start, stop, at in self._pieces.under(chunk):
                    if self._unheld(parameter) is None:
                        values = parameter.detach().reshape(-1)[start:stop]
                        self._begin_anew(chunk, chunk.start + at, values)
        self.watch.settle(fragment, equal)

    def reset_inner_state(self) -> None:
        inner_state.reset(self._inner)

    def adopt(self, before: TorchStore) -> None:
        """Take over the vectors of a store over the same parameters and fewer: the new ones start where they are.

        Slices are dealt by `hvd_slowmo.core.regroup.dealing.deal_extended`.
        """
        self.watch.adopt(before.watch)
        for number, segment in enumerate(self.layout.segments):
            if segment.role != "parameter":
                continue
            # A new group stands behind those of its segment, so the old segment is the beginning of the new one.
            old = next((n for n, s in enumerate(before.layout.segments) if segment.extends(s)), None)
            length = 0 if old is None else before.layout.segments[old].size
            for name, flats in self.vectors.items():
                flat = flats[number]
                assert flat is not None, "segments of parameters have every vector"
                if old is not None:
                    former = before.vectors[name][old]
                    assert former is not None, "segments of parameters have every vector"
                    flat[:length] = former
                if name == "anchor":
                    new = [ref.find().detach().reshape(-1).to(flat.dtype) for ref in self._refs[number]]
                    flat[length:] = torch.cat(new)[length:]

    def _unheld(self, parameter: torch.Tensor) -> torch.Tensor | None:
        return None if id(parameter) in self.watch.held and not parameter.requires_grad else parameter.detach()

    def _begin_anew(self, chunk: Chunk, start: int, values: torch.Tensor) -> None:
        """Set a stretch of the anchor to a parameter's values, without momentum."""
        for name in {"anchor", "v"} & {*self.vectors, *self.slices}:
            if self._own is not None and self._own.keeps(name, chunk.index):
                part = self._own.part(chunk)
                first, stop = (0, 0) if part is None else (max(start, part.start), min(start + len(values), part.stop))
                if part is not None and first < stop:
                    own = values[first - start : stop - start] if name == "anchor" else 0
                    self.slices[name][chunk.index][first - part.start : stop - part.start] = own
                continue
            flat = self.vectors[name][chunk.segment]
            if flat is not None:
                flat[start : start + len(values)] = values if name == "anchor" else 0

    def _flat(self, vector: str, stretch: Stretch) -> torch.Tensor:
        if vector == "in_flight":
            start = stretch.start - self.layout.chunks[stretch.index].start
            return self.in_flight[stretch.index][start : start + stretch.size]
        whole = self.vectors[vector][stretch.segment]
        assert whole is not None, "only segments of parameters have vectors"
        return whole[stretch.start : stretch.stop]

    def _stage(self, stretch: Stretch) -> torch.Tensor:
        """Return memory to put a stretch together: two per type and device, since one travels while another is used."""
        segment = self.layout.segments[stretch.segment]
        key = (segment.dtype, segment.device, self._turns[stretch.index] % 2)
        if key not in self._staging or len(self._staging[key]) < stretch.size:
            self._staging[key] = zeros_of(segment, stretch.size)
        return self._staging[key][: stretch.size]
