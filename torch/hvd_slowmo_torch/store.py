"""The core's vectors on PyTorch: the model's own tensors, gathered into flat chunks and scattered back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from hvd_slowmo.core.layout import Chunk, Segment
from hvd_slowmo_torch import inner_optimizer as base_state
from hvd_slowmo_torch.layout import Plan


class TorchStore:
    """`hvd_slowmo.core.machine.Store` on PyTorch tensors. Call it under torch.no_grad()."""

    def __init__(self, plan: Plan, base: Optimizer, vectors: tuple[str, ...]) -> None:
        self.layout = plan.layout
        self._places = plan.places
        self._base = base
        self.vectors: dict[str, list[torch.Tensor | None]] = {
            vector: [_zeros(s, s.size) if s.rule == "slow" else None for s in plan.layout.segments]
            for vector in vectors
        }
        self._statistics = plan.statistics
        self._staging: dict[tuple[str, str, str, int], torch.Tensor] = {}
        self._spans: dict[tuple[int, int, int], tuple[tuple[int, int, int, int], ...]] = {}

    def read(self, vector: str, chunk: Chunk) -> torch.Tensor:
        if vector in self.vectors:
            return self._flat(vector, chunk)
        gradients = vector == "gradient"
        flat = self._stage(chunk, vector)
        sources, targets = [], []
        for tensor, start, stop, at in self.tensors(chunk):
            source = _gradient(tensor) if gradients else tensor.detach()
            target = flat[at : at + stop - start]
            if source is None:
                target.zero_()
            else:
                sources.append(source.reshape(-1)[start:stop])
                targets.append(target)
        if targets:
            torch._foreach_copy_(targets, sources)
        return flat

    def write(self, vector: str, chunk: Chunk, value: torch.Tensor) -> None:
        if vector in self.vectors:
            flat = self._flat(vector, chunk)
            if flat.data_ptr() != value.data_ptr():  # updated in place otherwise
                flat.copy_(value)
            return
        gradients = vector == "gradient"
        sources, targets = [], []
        for tensor, start, stop, at in self.tensors(chunk):
            # A frozen parameter is equal everywhere, and its mean would be so up to rounding only.
            target = tensor.grad if gradients else None if _frozen(chunk, tensor) else tensor.detach()
            if target is None:
                continue
            source = value[at : at + stop - start]
            if not target.is_floating_point():
                source = source.round()
            if target.is_contiguous():
                targets.append(target.view(-1)[start:stop])
                sources.append(source)
            else:
                whole = target.reshape(-1).clone()
                whole[start:stop] = source
                target.copy_(whole.view(target.shape))
        if targets:
            torch._foreach_copy_(targets, sources)

    def written(self, chunk: Chunk, anchor: torch.Tensor) -> torch.Tensor:
        own = getattr(torch, self.layout.segments[chunk.segment].entries[0].dtype)
        return anchor if own == anchor.dtype else anchor.to(own).to(anchor.dtype)

    def zeros(self, chunk: Chunk) -> torch.Tensor:
        return self._stage(chunk, "model").zero_()  # in place of what would be read there

    def forget_gradients(self) -> None:
        """Free the places where gradients were put together."""
        self._staging = {key: place for key, place in self._staging.items() if key[0] != "gradient"}

    def present(self) -> list[float]:
        return [0.0 if p.grad is None else 1.0 for p in self._parameters()]

    def admit(self, counts: Any) -> None:
        for p, count in zip(self._parameters(), counts, strict=True):
            if count and p.grad is None:
                p.grad = torch.zeros_like(p)

    def finite(self) -> bool:
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for tensor in [*self._parameters(), *(slot() for slot in self._statistics)]:
            by_device.setdefault(tensor.device, []).append(tensor.detach())
        for parameters in by_device.values():
            # A finite norm has finite parts only, and costs a tenth of looking at each. Another may have overflowed.
            norms = torch.stack([norm.float() for norm in torch._foreach_norm(parameters)])
            if not bool(norms.isfinite().all()) and not all(bool(p.isfinite().all()) for p in parameters):
                return False
        return True

    def reset_base(self) -> None:
        base_state.reset(self._base)

    def adopt(self, before: TorchStore) -> None:
        """Take over the vectors of a store over the same parameters and fewer: the new ones start where they are."""
        for number, segment in enumerate(self.layout.segments):
            if segment.rule != "slow":
                continue
            # A new group stands behind those of its segment, so what was there is the beginning of what is.
            old = next((n for n, s in enumerate(before.layout.segments) if _same_place(s, segment)), None)
            length = 0 if old is None else before.layout.segments[old].size
            for vector, flats in self.vectors.items():
                flat = flats[number]
                assert flat is not None, "slow segments have every vector"
                if old is not None:
                    flat[:length] = before.vectors[vector][old]  # type: ignore[assignment]
                if vector == "anchor":
                    new = [slot().detach().reshape(-1).to(flat.dtype) for slot, *_ in self._places[number]]
                    flat[length:] = torch.cat(new)[length:]

    def _parameters(self) -> Iterator[torch.Tensor]:
        """One for each trained entry."""
        for segment, places in zip(self.layout.segments, self._places, strict=True):
            if segment.rule == "slow":
                yield from (slot() for slot, *_ in places)

    def _flat(self, vector: str, chunk: Chunk) -> torch.Tensor:
        whole = self.vectors[vector][chunk.segment]
        assert whole is not None, "only slow segments have an anchor and v"
        return whole[chunk.start : chunk.stop]

    def _stage(self, chunk: Chunk, vector: str) -> torch.Tensor:
        """A place to put a chunk together.

        Two per type and device, since one travels while another is used; gradients have one each, since all of them
        travel at once.
        """
        segment = self.layout.segments[chunk.segment]
        place = chunk.index if vector == "gradient" else chunk.index % 2
        key = (vector, segment.dtype, segment.device, place)
        if key not in self._staging or len(self._staging[key]) < chunk.size:
            self._staging[key] = _zeros(segment, chunk.size)
        return self._staging[key][: chunk.size]

    def tensors(self, chunk: Chunk) -> Iterator[tuple[torch.Tensor, int, int, int]]:
        """The tensors under a chunk: (tensor, from, to within it, place within the chunk)."""
        places, key = self._places[chunk.segment], (chunk.segment, chunk.start, chunk.stop)
        if key not in self._spans:
            spans = self.layout.spans(chunk)
            offsets = [place.offset for place in places]
            self._spans[key] = tuple((n, a + offsets[n], b + offsets[n], at) for n, a, b, at in spans)
        for number, start, stop, at in self._spans[key]:
            yield places[number].slot(), start, stop, at


def _same_place(a: Segment, b: Segment) -> bool:
    return (a.rule, a.dtype, a.device, a.entries[0].dtype) == (b.rule, b.dtype, b.device, b.entries[0].dtype)


def _frozen(chunk: Chunk, tensor: torch.Tensor) -> bool:
    return chunk.rule == "slow" and not tensor.requires_grad


def _gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise TypeError(
            f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient, and gradients can only be averaged "
            "dense. Use Embedding(sparse=False), or gradients='local' without warm-up."
        )
    return parameter.grad


def _zeros(segment: Segment, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=getattr(torch, segment.dtype), device=segment.device)
