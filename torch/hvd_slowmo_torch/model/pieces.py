"""The tensors under the stretches of a layout: gathered into flat ones, and scattered back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from hvd_slowmo.core.parts.layout import Segment, Stretch
from hvd_slowmo_torch.model.layout import TensorRef, TorchLayout


class Pieces:
    """Finds the tensors under the stretches of a layout.

    Args:
        layout: of the model.
    """

    def __init__(self, layout: TorchLayout) -> None:
        self._layout = layout
        self._spans: dict[tuple[int, int, int], tuple[tuple[TensorRef, int, int, int], ...]] = {}

    def under(self, stretch: Stretch) -> Iterator[tuple[torch.Tensor, int, int, int]]:
        """Yield the tensors under a stretch: (tensor, from, to in the flattened tensor, place in the stretch)."""
        key = (stretch.segment, stretch.start, stretch.stop)
        if key not in self._spans:
            refs = self._layout.refs[stretch.segment]
            self._spans[key] = tuple(
                (refs[n], a + refs[n].offset, b + refs[n].offset, at)
                for n, a, b, at in self._layout.layout.spans(stretch)
            )
        for ref, start, stop, at in self._spans[key]:
            yield ref.find(), start, stop, at

    def gather(
        self, stretch: Stretch, flat: torch.Tensor, value: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> torch.Tensor:
        """Copy a value of each tensor under a stretch into `flat`, zeros where it has none; return `flat`."""
        sources, targets = [], []
        for tensor, start, stop, at in self.under(stretch):
            source, target = value(tensor), flat[at : at + stop - start]
            if source is None:
                target.zero_()
            else:
                sources.append(source.reshape(-1)[start:stop])
                targets.append(target)
        if targets:
            torch._foreach_copy_(targets, sources)
        return flat

    def scatter(
        self, stretch: Stretch, flat: torch.Tensor, target_of: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> None:
        """Copy `flat` into a target for each tensor under a stretch, where it has one."""
        sources, targets = [], []
        for tensor, start, stop, at in self.under(stretch):
            target = target_of(tensor)
            if target is None:
                continue
            source = flat[at : at + stop - start]
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


def zeros_of(segment: Segment, size: int, on_host: bool = False) -> torch.Tensor:
    """Return zeros of a segment's type on its device, or in host memory from which CUDA copies without a wait."""
    dtype = getattr(torch, segment.dtype)
    if on_host and torch.device(segment.device).type == "cuda":
        return torch.zeros(size, dtype=dtype, pin_memory=True)
    return torch.zeros(size, dtype=dtype, device=segment.device)
