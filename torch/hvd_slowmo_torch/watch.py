"""Watching the model: changes that no step of the optimizer has made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from hvd_slowmo.core.progress import Vector
from hvd_slowmo.core.store import Condition
from hvd_slowmo_torch.layout import TensorRef, TorchLayout

logger = logging.getLogger("hvd_slowmo")


class WatchNotes(NamedTuple):
    """A watch's notes for a checkpoint, by the parameters' own names."""

    norms: dict[str, float]  # of the parameters that are as the last meeting has left them; -1 for the others
    held: dict[str, bool]  # whether nobody has moved it, see `ModelWatch.held`
    entered: bool  # values have come from outside, and no meeting has told the others yet


class ModelWatch:
    """Compares the model with the layout, and with its own state after the last meeting.

    PyTorch counts the changes of each tensor, so that a look costs no pass over the values. Changes by way of `.data`
    are not counted and not seen.

    Args:
        layout: of the model.
        buffers: returns the names of the model's floating-point buffers.

    Attributes:
        fits: False once parameters of another form should have been mixed; the next meeting tells the others.
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
        self._entered = self._apart = False
        self._misfit_found = (0, "")  # while mixing
        self._resumed: WatchNotes | None = None  # of a state that was loaded, until the model is looked at
        self._moved: list[bool] = [False] * len(self._parameters)  # before `_versions` were noted
        self.held: set[int] = set()

    def condition(self) -> Condition:
        """Return the state in which the model comes to a meeting."""
        misfit, name = self._misfit()
        if misfit:
            return Condition(misfit, 0, [0.0] * len(self._parameters), name)
        self._resume()
        tensors = self._tensors()
        moved = [float(p.requires_grad or changed) for p, changed in zip(tensors, self._changed(tensors), strict=True)]
        return Condition(0, int(self._entered), moved)

    @property
    def fits(self) -> bool:
        return not self._misfit_found[0]

    def look(self, mixes: bool = False) -> None:
        """Notice values that were given to the model between the moment when all were equal and the next step.

        Args:
            mixes: this worker is going to send parameters to others before all meet.
        """
        if mixes and self.fits:
            self._misfit_found = self._form_of_parameters()
        self._resume()
        if self._norms is None:
            return
        tensors = self._tensors()
        changed = [p._version for p in tensors] != self._versions
        if changed and not torch.allclose(_norms(tensors), self._norms, rtol=0, atol=0, equal_nan=True):
            self._entered = self._apart = True
        self._norms = None

    def take_apart(self) -> bool:
        """Return whether values have come from outside that an exchange of gradients is still to tell of."""
        self.look()
        apart, self._apart = self._apart, False
        return apart

    def misfit_of(self, number: int) -> bool:
        """Return whether a parameter has another form than at construction."""
        return _form(self._parameters[number]) != self._forms[number]

    def hold(self, moved: Vector) -> None:
        """Hold the parameters for which this is 0."""
        self.held = {id(p) for p, count in zip(self._tensors(), moved, strict=True) if not count}

    def settle(self, equal: bool) -> None:
        """Note the model's present state; see `hvd_slowmo.core.store.Store.settle`."""
        tensors = self._tensors()
        self._entered = self._apart = False
        self._misfit_found, self._resumed = (0, ""), None
        self._note(tensors, [False] * len(tensors))
        self._norms = _norms(tensors) if equal else None

    def adopt(self, before: ModelWatch) -> None:
        """Take over the notes of a watch over the same parameters and fewer."""
        equal = before._norms is not None  # and still are, but for what this look finds
        before.look()
        tensors = before._tensors()
        known = {id(p): changed for p, changed in zip(tensors, before._changed(tensors), strict=True)}
        tensors = self._tensors()
        self._note(tensors, [known.get(id(p), False) for p in tensors])
        self._entered, self._apart, self.held = before._entered, before._apart, before.held
        self._norms = _norms(tensors) if equal else None

    def expect_values(self) -> None:
        """Take other values for values from outside until the next step, as `settle(equal=True)` does.

        For a worker that is alone: nothing has been decided, and all else stays noted.
        """
        self.look()
        self._norms = _norms(self._tensors())

    @contextmanager
    def expecting_writes(self) -> Iterator[None]:
        """Take values that are written within for none from outside. Those of frozen parameters count as moved."""
        equal = self._norms is not None  # and still are, but for what this look finds
        self.look()
        try:
            yield
        finally:
            self._norms = _norms(self._tensors()) if equal else None

    def notes(self) -> WatchNotes:
        """Return the notes by which a resume leaves alone the parameters that the run without a stop leaves alone."""
        if self._resumed is not None:
            return self._resumed
        tensors = self._tensors()
        names = [ref.spec.own for ref in self._parameters]
        norms = [
            -1.0 if changed else norm
            for changed, norm in zip(self._changed(tensors), _norms(tensors).tolist(), strict=True)
        ]
        held = [id(p) in self.held for p in tensors]
        return WatchNotes(dict(zip(names, norms, strict=True)), dict(zip(names, held, strict=True)), self._entered)

    def resume(self, notes: WatchNotes | None) -> None:
        """Take the next values that the model is given for a resume.

        Args:
            notes: of the state that is loaded; None where it has none: everything counts as moved that is written.
        """
        self._entered, self._norms, self._resumed = False, None, notes
        self._apart, self._misfit_found = False, (0, "")
        self.held = set()

    def _resume(self) -> None:
        """Go on from loaded notes: only now has the model its values, whatever was loaded first."""
        if self._resumed is None:
            return
        (norms, held, self._entered), self._resumed = self._resumed, None
        tensors = self._tensors()
        names = [ref.spec.own for ref in self._parameters]
        # A parameter with another value than the notes are of has moved: the workers' values may differ.
        present = zip(names, _norms(tensors).tolist(), strict=True)
        self._note(tensors, [norms.get(name) != norm for name, norm in present])
        self.held = {id(p) for name, p in zip(names, tensors, strict=True) if held.get(name, False)}

    def _note(self, tensors: list[torch.Tensor], moved: list[bool]) -> None:
        self._moved, self._versions = moved, [p._version for p in tensors]

    def _changed(self, tensors: list[torch.Tensor]) -> list[bool]:
        """Return which parameters have changed since the last meeting."""
        noted = zip(tensors, self._versions, self._moved, strict=True)
        return [moved or p._version != version for p, version, moved in noted]

    def _tensors(self) -> list[torch.Tensor]:
        return [ref.find() for ref in self._parameters]

    def _form_of_parameters(self) -> tuple[int, str]:
        """Return (0, ""), or the number and name of a parameter of another form, as `_misfit`."""
        for number, ref in enumerate(self._parameters):
            if self.misfit_of(number):
                logger.error(
                    "%s has another form than at the construction of SlowMo: this worker can't go on, sends zeros from "
                    "now on and tells the others when all meet.",
                    ref.spec.name,
                )
                return number + 1, ref.spec.name
        return 0, ""

    def _misfit(self) -> tuple[int, str]:
        if not self.fits:
            return self._misfit_found
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
