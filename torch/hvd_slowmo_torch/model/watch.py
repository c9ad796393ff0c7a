"""Watching the model: changes that no step of the optimizer has made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from hvd_slowmo.core.parts.progress import Vector
from hvd_slowmo.core.parts.store import Condition
from hvd_slowmo_torch.model.layout import TensorRef, TorchLayout

logger = logging.getLogger("hvd_slowmo")

_ROUNDING = 1e-6
"""Relative difference of two norms of the same values, on other threads say."""


class WatchNotes(NamedTuple):
    """A watch's notes for a checkpoint: by the parameters' own names, and by fragment."""

    norms: dict[str, float]
    held: dict[str, bool]  # whether nobody has moved it, see `ModelWatch.held`
    moved: dict[str, list[bool]]  # whether it has changed since the fragment's last meeting
    sent_moved: dict[str, list[bool]]  # the same as it was sent, where the fragment is in flight
    entered: list[bool]  # values have come from outside, and no meeting of the fragment has told the others yet
    sent_entered: list[bool]


class ModelWatch:
    """Compares the model with the layout, and with its own state after the last meeting.

    PyTorch counts the changes of each tensor, so that most looks cost no pass over the values. It does not count those
    by way of `.data`: these are seen where all were equal before, in the tensors' norms.

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
        self._versions = [p._version for p in self._tensors()]
        self._norms: torch.Tensor | None = None
        self._apart = False
        self._misfit_found = (0, "")  # while mixing
        self._resumed: WatchNotes | None = None  # of a state that was loaded, until the model is looked at
        self._fragments = range(layout.layout.fragments)
        self._entered = [False for _ in self._fragments]
        # Before `_versions` were noted, and since a fragment's last meeting.
        self._moved = [[False] * len(self._parameters) for _ in self._fragments]
        self._sent = [([False] * len(self._parameters), False) for _ in self._fragments]  # moved, entered
        self.held: set[int] = set()

    def condition(self, fragment: int | None) -> Condition:
        """Return the state in which the model comes to a meeting; see `hvd_slowmo.core.parts.store.Store.condition`."""
        misfit, name = self._misfit()
        if misfit:
            return Condition(misfit, 0, [0.0] * len(self._parameters), name)
        self._resume()
        among = self._fragments if fragment is None else (fragment,)
        moved = [float(any(each)) for each in zip(*(self._moving(number) for number in among), strict=True)]
        return Condition(0, int(any(self._entered[number] for number in among)), moved)

    def sent_condition(self, fragment: int) -> Condition:
        """Return the state in which a fragment's block was marked, whatever has become of it since."""
        self._resume()
        moved, entered = self._sent[fragment]
        return Condition(0, int(entered), [float(each) for each in moved])

    def mark_block(self, fragment: int | None) -> None:
        """Begin a new block of a fragment; None for all."""
        for number in self._fragments if fragment is None else (fragment,):
            self._sent[number] = self._moving(number), self._entered[number]
        self._absorb()
        for number in self._fragments if fragment is None else (fragment,):
            self._moved[number], self._entered[number] = [False] * len(self._parameters), False

    def unmark_block(self, fragment: int) -> None:
        """Take `mark_block` back: what had changed before it has changed since the fragment's last meeting."""
        self._resume()
        moved, entered = self._sent[fragment]
        self._moved[fragment] = [a or b for a, b in zip(moved, self._moved[fragment], strict=True)]
        self._entered[fragment] |= entered

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
        # Without a change that PyTorch counts, values came through `.data`, or the norms were summed in another order.
        tolerance = 0 if changed else _ROUNDING
        same = torch.isclose(_norms(tensors), self._norms, rtol=tolerance, atol=0, equal_nan=True).tolist()
        if not all(same):
            self._entered, self._apart = [True for _ in self._fragments], True
            for moved in self._moved:
                moved[:] = [before or not unchanged for before, unchanged in zip(moved, same, strict=True)]
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
        """Hold the parameters for which this is 0. Writes that follow are not taken for changes."""
        self._absorb()
        self.held = {id(p) for p, count in zip(self._tensors(), moved, strict=True) if not count}

    def settle(self, fragment: int | None, equal: bool) -> None:
        """Note the model's present state; see `hvd_slowmo.core.parts.store.Store.settle`."""
        tensors = self._tensors()
        self._apart = False
        self._misfit_found, self._resumed = (0, ""), None
        if fragment is None:
            self._entered = [False for _ in self._fragments]
            self._moved = [[False] * len(tensors) for _ in self._fragments]
        self._versions = [p._version for p in tensors]
        self._norms = _norms(tensors) if equal else None

    def adopt(self, before: ModelWatch) -> None:
        """Take over the notes of a watch over the same parameters and fewer."""
        equal = before._norms is not None  # and still are, but for what this look finds
        before.look()
        tensors = before._tensors()
        known = {id(p): changed for p, changed in zip(tensors, before._changed(tensors, 0), strict=True)}
        tensors = self._tensors()
        self._moved = [[known.get(id(p), False) for p in tensors]]  # there is one fragment where groups are added
        self._versions = [p._version for p in tensors]
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
        held = [id(p) in self.held for p in tensors]
        moved = zip(*(self._changed(tensors, number) for number in self._fragments), strict=True)
        sent = zip(*(moved for moved, _ in self._sent), strict=True)
        return WatchNotes(
            norms=dict(zip(names, _norms(tensors).tolist(), strict=True)),
            held=dict(zip(names, held, strict=True)),
            moved=dict(zip(names, map(list, moved), strict=True)),
            sent_moved=dict(zip(names, map(list, sent), strict=True)),
            entered=list(self._entered),
            sent_entered=[entered for _, entered in self._sent],
        )

    def resume(self, notes: WatchNotes | None) -> None:
        """Take the next values that the model is given for a resume.

        Args:
            notes: of the state that is loaded; None where it has none: everything counts as moved that is written.
        """
        self._entered, self._norms, self._resumed = [False for _ in self._fragments], None, notes
        self._apart, self._misfit_found = False, (0, "")
        self.held = set()

    def _resume(self) -> None:
        """Go on from loaded notes: only now has the model its values, whatever was loaded first."""
        if self._resumed is None:
            return
        notes, self._resumed = self._resumed, None
        tensors = self._tensors()
        names = [ref.spec.own for ref in self._parameters]
        # A parameter with another value than the notes are of has moved: the workers' values may differ.
        other = [notes.norms.get(name) != norm for name, norm in zip(names, _norms(tensors).tolist(), strict=True)]
        known = [notes.moved.get(name, [True for _ in self._fragments]) for name in names]
        self._moved = [
            [moved[number] or apart for moved, apart in zip(known, other, strict=True)] for number in self._fragments
        ]
        sent = [notes.sent_moved.get(name, [True for _ in self._fragments]) for name in names]
        self._sent = [([moved[n] for moved in sent], notes.sent_entered[n]) for n in self._fragments]
        self._entered = list(notes.entered)
        self._versions = [p._version for p in tensors]
        self.held = {id(p) for name, p in zip(names, tensors, strict=True) if notes.held.get(name, False)}

    def _absorb(self) -> None:
        """Count what has changed so far as moved, for every fragment that has yet to meet."""
        if self._norms is not None:  # all are equal still, but for values from outside, which a look will find
            return
        tensors = self._tensors()
        self._moved = [self._changed(tensors, number) for number in self._fragments]
        self._versions = [p._version for p in tensors]

    def _moving(self, fragment: int) -> list[bool]:
        """Return which parameters are trained, or have changed since the fragment's last meeting."""
        tensors = self._tensors()
        return [
            p.requires_grad or changed for p, changed in zip(tensors, self._changed(tensors, fragment), strict=True)
        ]

    def _changed(self, tensors: list[torch.Tensor], fragment: int) -> list[bool]:
        """Return which parameters have changed since the fragment's last meeting."""
        noted = zip(tensors, self._versions, self._moved[fragment], strict=True)
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
