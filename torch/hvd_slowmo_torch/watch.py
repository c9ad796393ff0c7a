"""Watching the model: changes that no step of the optimizer has made."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvd_slowmo.core.progress import Vector
from hvd_slowmo.core.store import Condition
from hvd_slowmo_torch.layout import TensorRef, TorchLayout


class ModelWatch:
    """Compares the model with the layout, and with its own state after the last meeting.

    PyTorch counts the changes of each tensor, so that a look costs no pass over the values. Changes by way of `.data`
    are not counted and not seen.

    Args:
        layout: of the model.
        buffers: returns the names of the model's floating-point buffers.

    Attributes:
        held: ids of the parameters that nobody has moved: they are left alone while they are frozen.
    """

    def __init__(self, layout: TorchLayout, buffers: Callable[[], set[str]]) -> None:
        self._parameters = layout.refs_of("parameter")
        # The inner optimizer's own state may come and go; it is made where it is missing.
        self._watched = layout.refs_of("parameter", "statistic", "optimizer_state")
        self._forms = [None if ref.spec.role == "optimizer_state" else _form(ref) for ref in self._watched]
        self._list_buffers = buffers
        self._buffers = buffers()
        self._versions: list[int] = []
        self._norms: torch.Tensor | None = None
        self._entered = False
        self.held: set[int] = set()

    def condition(self) -> Condition:
        """Return the state in which the model comes to a meeting."""
        misfit, name = self._misfit()
        if misfit:
            return Condition(misfit, 0, [0.0] * len(self._parameters), name)
        moved = [
            float(p.requires_grad or p._version != before)
            for p, before in zip(self._tensors(), self._versions, strict=True)
        ]
        return Condition(0, int(self._entered), moved)

    def look(self) -> None:
        """Notice values that were given to the model between the moment when all were equal and the next step."""
        if self._norms is None:
            return
        tensors = self._tensors()
        if [p._version for p in tensors] != self._versions:
            self._entered = self._entered or not torch.allclose(
                _norms(tensors), self._norms, rtol=0, atol=0, equal_nan=True
            )
        self._norms = None

    def hold(self, moved: Vector) -> None:
        """Hold the parameters for which this is 0."""
        self.held = {id(p) for p, count in zip(self._tensors(), moved, strict=True) if not count}

    def settle(self, equal: bool) -> None:
        """Note the model's present state; see `hvd_slowmo.core.store.Store.settle`."""
        tensors = self._tensors()
        self._entered = False
        self._versions = [p._version for p in tensors]
        self._norms = _norms(tensors) if equal else None

    def adopt(self, before: ModelWatch) -> None:
        """Take over the notes of a watch over the same parameters and fewer."""
        before.look()
        known = {id(p): version for p, version in zip(before._tensors(), before._versions, strict=True)}
        self._versions = [known.get(id(p), p._version) for p in self._tensors()]
        self._entered, self.held = before._entered, before.held

    def forget(self) -> None:
        """Take the next values that the model is given for a resume."""
        self._entered, self._norms = False, None

    def _tensors(self) -> list[torch.Tensor]:
        return [ref.find() for ref in self._parameters]

    def _misfit(self) -> tuple[int, str]:
        for number, (ref, form) in enumerate(zip(self._watched, self._forms, strict=True), start=1):
            if form is None:
                continue
            try:
                fits = _form(ref) == form
            except AttributeError:  # the buffer is gone
                fits = False
            if not fits:
                return number, ref.spec.name
        new = self._list_buffers() - self._buffers
        return (-1, min(new)) if new else (0, "")


def _form(ref: TensorRef) -> tuple[torch.Size, torch.dtype, torch.device]:
    tensor = ref.find()
    return tensor.shape, tensor.dtype, tensor.device


def _norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return a number for each tensor, which other values change but for rare cases (a permutation, other signs)."""
    values = [p.detach() if p.dtype in (torch.float32, torch.float64) else p.detach().float() for p in tensors]
    return torch.stack([norm.double().cpu() for norm in torch._foreach_norm(values)])
