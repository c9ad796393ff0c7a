"""The parameters' gradients, gathered into flat chunks and scattered back."""

from __future__ import annotations

import torch

from hvd_slowmo.core.parts.layout import Chunk
from hvd_slowmo.core.parts.progress import Vector
from hvd_slowmo_torch.model.layout import TorchLayout
from hvd_slowmo_torch.model.pieces import Pieces, zeros_of
from hvd_slowmo_torch.model.watch import ModelWatch


class TorchGradients:
    """`hvd_slowmo.core.parts.store.GradientSource` on the parameters' `grad`. Call it under torch.no_grad().

    Args:
        layout: of the model.
        watch: of the model.
    """

    def __init__(self, layout: TorchLayout, watch: ModelWatch) -> None:
        self.layout = layout.layout
        self._pieces = Pieces(layout)
        self._watch = watch
        self._misfit = 0
        self._parameters = layout.refs_of("parameter")
        self._numbers: dict[int, list[int]] = {}  # per chunk, of its parameters
        start = 0
        for segment in range(len(layout.refs)):
            if self.layout.segments[segment].role != "parameter":
                continue
            for chunk in self.layout.chunks:
                if chunk.segment == segment:
                    self._numbers[chunk.index] = [start + number for number, *_ in self.layout.spans(chunk)]
            start += len(layout.refs[segment])
        self._staging: dict[int, torch.Tensor] = {}  # one per chunk, since all of them travel at once

    def read(self, chunk: Chunk) -> torch.Tensor:
        if chunk.index not in self._staging:
            self._staging[chunk.index] = zeros_of(self.layout.segments[chunk.segment], chunk.size)
        odd = next((number for number in self._numbers[chunk.index] if self._watch.misfit_of(number)), None)
        if odd is not None:
            self._misfit = odd + 1
            return self._staging[chunk.index].zero_()
        return self._pieces.gather(chunk, self._staging[chunk.index], _gradient)

    def write(self, chunk: Chunk, mean: torch.Tensor) -> None:
        self._pieces.scatter(chunk, mean, _gradient)

    def present(self) -> list[float]:
        return [0.0 if ref.find().grad is None else 1.0 for ref in self._parameters]

    def misfit(self) -> int:
        found, self._misfit = self._misfit, 0
        return found

    def entered(self) -> int:
        return int(self._watch.take_apart())

    def admit(self, counts: Vector) -> None:
        for ref, count in zip(self._parameters, counts, strict=True):
            p = ref.find()
            if count and p.grad is None:
                p.grad = torch.zeros_like(p)

    def parameters(self, chunk: Chunk) -> list[torch.Tensor]:
        """Return the parameters under a chunk."""
        return [p for p, *_ in self._pieces.under(chunk)]

    def forget(self) -> None:
        """Free the memory in which gradients are put together."""
        self._staging = {}


def _gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise TypeError(
            f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient, and gradients can only be averaged "
            "dense. Use Embedding(sparse=False), or gradients='local' without warm-up."
        )
    gradient = parameter.grad
    if gradient is not None and not gradient.is_contiguous() and 0 in gradient.stride():
        parameter.grad = gradient.contiguous()  # one that is expanded can't be written to
    return parameter.grad
