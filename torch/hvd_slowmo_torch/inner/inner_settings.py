"""Values that an inner optimizer changes outside of `state`: in its param_groups, and in attributes of its own.

Schedule-free and D-adaptation methods count their steps and adapt a rate in `param_groups`; others keep a counter as an
attribute. Such a value is noticed when a step changes it. From then on it is saved, loaded, reset and handed over like
the state. A value that anything else has changed since construction, such as the momentum of a scheduler, is saved and
loaded too, but not reset. Learning rates are not part of this: SlowMo treats them separately.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch.optim import Optimizer

from hvd_slowmo.checkpoint.bounded_json import decode
from hvd_slowmo.checkpoint.facts import parse, plain
from hvd_slowmo.errors import CheckpointError, spell_error
from hvd_slowmo_torch.inner.saved_values import check_value

_NOT_OWN = frozenset(
    ("params", "param_names", "lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum")
)
"""Keys of param_groups that torch.optim, SlowMo or a scheduler cares for."""

_OF_TORCH = frozenset(("state", "param_groups", "defaults", "grad_scale", "found_inf"))
"""Attributes that torch.optim or a GradScaler sets."""

_FIXED = frozenset((bool, int, float, str, type(None)))
"""Types whose objects never change."""

_ABSENT = object()


class _Place(Struct, frozen=True, forbid_unknown_fields=True):
    """The values of a place in `dump`'s form, by name: those that steps have changed, and those that others have."""

    moved: dict[str, Any]
    set: dict[str, Any]


@dataclass
class _Record:
    """Per place, the attributes first: the values at construction, and the names of those that steps have changed."""

    initial: list[dict[str, Any]] = field(default_factory=list)
    moved: list[set[str]] = field(default_factory=list)
    _names: dict[int, tuple[list[str], list[str]]] = field(default_factory=dict)  # all of a place, and its own ones

    def own(self, values: dict[str, Any], number: int) -> tuple[list[str], list[Any]]:
        """Return the names that are the optimizer's own and their values; most steps find the same names."""
        known = self._names.get(number)
        if known is None or known[0] != list(values):
            known = self._names[number] = list(values), [key for key in values if _is_own(key, number)]
        return known[1], [values[key] for key in known[1]]


_records: WeakKeyDictionary[Optimizer, _Record] = WeakKeyDictionary()


def record(inner: Optimizer) -> None:
    """Remember the present values of all places that are new: at construction all, later those of added groups.

    An optimizer that has made steps already is taken to have begun at its defaults, where it has them.

    Example:
        >>> class Counting(torch.optim.SGD):  # not one of PyTorch's own
        ...     pass
        >>> inner = Counting([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> record(inner)
        >>> with watched(inner):
        ...     inner.param_groups[0]["k"] = 1
        >>> reset(inner)
        >>> "k" in inner.param_groups[0]
        False
    """
    known = _records.setdefault(inner, _Record())
    for number, values in enumerate(_places(inner)):
        if number < len(known.initial):
            continue
        initial = {key: _copied(value) for key, value in _own(values, number).items()}
        if number and inner.state:
            initial |= {key: value for key, value in inner.defaults.items() if key in initial}
        known.initial.append(initial)
        known.moved.append(set())


def watched(inner: Optimizer, *, resets: bool = False) -> AbstractContextManager[None]:
    """Return a context that notices the values that a step within changes.

    Args:
        inner: the inner optimizer. PyTorch's own change nothing there, and are not looked at.
        resets: its state may be reset later.

    Raises:
        ValueError: at the end, if a changed value can't be reset, and may have to be.
    """
    return _UNWATCHED if type(inner).__module__.startswith("torch.optim.") else _Watched(inner, resets)


_UNWATCHED = nullcontext()


class _Watched:
    """The context of `watched`. Most values are the same objects before and after, compared first."""

    __slots__ = ("_before", "_inner", "_known", "_resets")

    def __init__(self, inner: Optimizer, resets: bool) -> None:
        self._inner, self._resets = inner, resets

    def __enter__(self) -> None:
        known = _records.get(self._inner)
        if known is None or len(known.initial) <= len(self._inner.param_groups):
            record(self._inner)
            known = _records[self._inner]
        self._known = known
        self._before = []
        for number, values in enumerate(_places(self._inner)):
            names, own = known.own(values, number)
            # What can change in place: the same object afterwards does not mean the same value.
            fixed = _FIXED.issuperset(map(type, own))
            self._before.append((names, own, None if fixed else [_mark(x) for x in own]))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        for number, (values, before) in enumerate(zip(_places(self._inner), self._before, strict=False)):
            names, own = self._known.own(values, number)
            old_names, old, marks = before
            if marks is None and names is old_names and all(map(is_, own, old)):
                continue
            was = dict(zip(old_names, map(_mark, old) if marks is None else marks, strict=True))
            self._note(number, {k: x for k, x in zip(names, own, strict=True) if k not in was or was[k] != _mark(x)})

    def _note(self, number: int, changed: dict[str, Any]) -> None:
        moved = self._known.moved[number]
        for key, value in changed.items():
            if key in moved or (not number and callable(value)):
                continue
            moved.add(key)
            if self._resets and not _is_value(value):
                raise ValueError(
                    f"{type(self._inner).__name__} changes {_spell(key, number)} in its steps, a "
                    f"{type(value).__name__}, which SlowMo can't reset. Use inner_state='maintain' and "
                    "nonfinite='raise'."
                )


def reset(inner: Optimizer, *, attributes_only: bool = False) -> None:
    """Give all values that steps have changed their initial values; settings and learning rates stay."""
    known = _records.get(inner, _Record())
    places = _places(inner)[: 1 if attributes_only else None]
    for values, initial, moved in zip(places, known.initial, known.moved, strict=False):
        for key in moved:
            _set(values, key, initial.get(key, _ABSENT))


def dump(inner: Optimizer, *, attributes_only: bool = False) -> NDArray[np.uint8] | None:
    """Return the values that a resume needs, encoded; None if there are none.

    Args:
        inner: the inner optimizer.
        attributes_only: leave out the param_groups, which a state_dict has already, and what can't be stored.

    Raises:
        CheckpointError: a value that steps change is of a type that can't be stored.

    Example:
        >>> class Counting(torch.optim.SGD):  # not one of PyTorch's own
        ...     pass
        >>> inner = Counting([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> record(inner)
        >>> dump(inner) is None
        True
        >>> with watched(inner):
        ...     inner.param_groups[0]["k"] = 1
        >>> bytes(dump(inner)).decode()
        '[{"moved": {}, "set": {}}, {"moved": {"k": 1}, "set": {}}]'
    """
    found: list[dict[str, dict[str, Any]]] = []
    known = _records.get(inner, _Record())
    places = _places(inner)[: 1 if attributes_only else None]
    for number, (values, initial, moved) in enumerate(zip(places, known.initial, known.moved, strict=False)):
        place: dict[str, dict[str, Any]] = {"moved": {}, "set": {}}
        for key, value in sorted(_own(values, number).items()):
            if key in moved and (_is_value(value) or not attributes_only):
                place["moved"][key] = _encoded(inner, key, number, value)
            elif key not in moved and number and _is_plain(value) and value != initial.get(key, _ABSENT):
                place["set"][key] = _encoded(inner, key, number, value)
        found.append(place)
    if not any(part for place in found for part in place.values()):
        return None
    return np.frombuffer(json.dumps(found).encode(), dtype=np.uint8)


def prepare(
    inner: Optimizer, encoded: NDArray[np.uint8] | None, *, attributes_only: bool = False
) -> Callable[[], None]:
    """Return a function that sets the values of `dump`; nothing is changed before it is called.

    Args:
        inner: the inner optimizer.
        encoded: None resets the values that steps have changed.
        attributes_only: as in `dump`.

    Raises:
        CheckpointError: the values do not fit this optimizer.
    """
    if encoded is None:
        return lambda: reset(inner, attributes_only=attributes_only)
    try:
        decoded = decode(bytes(encoded).decode())
        saved = [plain(place) for place in parse(decoded, list[_Place], "the inner optimizer's values")]
        places = [{kind: {k: _decoded(x) for k, x in place[kind].items()} for kind in place} for place in saved]
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the inner optimizer's values can't be read: {spell_error(error)}.") from error
    if len(places) != (1 if attributes_only else 1 + len(inner.param_groups)):
        raise CheckpointError(
            f"the inner optimizer has {len(places) - 1} parameter groups with values of their own in the checkpoint, "
            f"here it has {len(inner.param_groups)}. Give it the groups of the run that is resumed."
        )

    for number, (present, place) in enumerate(zip(_places(inner), places, strict=False)):
        for key, value in (place["set"] | place["moved"]).items():
            # An attribute must not hide a method either.
            if not _is_own(key, number) or not (number or not callable(getattr(inner, key, None))):
                raise CheckpointError(f"{_spell(key, number)} is no value that {type(inner).__name__} keeps.")
            check_value(_spell(key, number), value, present.get(key))

    def commit() -> None:
        record(inner)
        reset(inner, attributes_only=attributes_only)
        for values, moved, place in zip(_places(inner), _records[inner].moved, places, strict=False):
            moved.update(place["moved"])
            for key, value in (place["set"] | place["moved"]).items():
                _set(values, key, value)

    return commit


def _places(inner: Optimizer) -> list[dict[str, Any]]:
    """Return the dicts that hold values: the attributes, then the groups."""
    return [vars(inner), *inner.param_groups]


def _own(values: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the values of a place that belong to the optimizer itself."""
    return {key: x for key, x in values.items() if _is_own(key, number) and (number or not callable(x))}


def _is_own(key: str, number: int) -> bool:
    return key not in _NOT_OWN if number else not (key.startswith("_") or key in _OF_TORCH)


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number, a text, None or a sequence of these."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _is_value(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or _is_plain(value)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return copy.deepcopy(value) if _is_plain(value) else value


class _Mark:
    """A tensor or another object at one time; equal marks mean that nothing has been written to it since."""

    def __init__(self, value: Any) -> None:
        self.value = value  # kept alive, because a new object may get a freed one's address
        self.version = value._version if isinstance(value, torch.Tensor) else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mark) and self.value is other.value and self.version == other.version

    __hash__ = None  # type: ignore[assignment]


def _mark(value: Any) -> Any:
    """Return an object that compares unequal once the value has changed. Nothing waits for a device."""
    if isinstance(value, dict):
        return [(key, _mark(x)) for key, x in value.items()]
    if isinstance(value, (list, tuple)):
        return [_mark(x) for x in value]
    return (type(value), value) if _is_plain(value) else _Mark(value)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a value; in place where it is a tensor, because the optimizer may hold it elsewhere too."""
    present = values.get(key)
    if value is _ABSENT:
        values.pop(key, None)
    elif not isinstance(value, torch.Tensor):
        values[key] = _copied(value)
    elif isinstance(present, torch.Tensor) and (present.shape, present.dtype) == (value.shape, value.dtype):
        with torch.no_grad():
            present.copy_(value)
    else:
        values[key] = value.detach().clone()


def _encoded(inner: Optimizer, key: str, number: int, value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.is_complex():
        flat = value.detach().cpu().reshape(-1).tolist()
        return {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "values": flat}
    if not _is_plain(value):
        raise CheckpointError(
            f"{type(inner).__name__} changes {_spell(key, number)} in its steps, a {type(value).__name__}, and a "
            "checkpoint holds tensors, numbers and texts only. Save state_dict() of every rank instead."
        )
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_encoded(inner, key, number, x) for x in value]}
    return value


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        dtype = vars(torch).get(value["tensor"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value['tensor']!r} is no type of a tensor")
        return torch.tensor(value["values"], dtype=dtype).reshape(value["shape"])
    ((kind, items),) = value.items()
    return {"list": list, "tuple": tuple}[kind](map(_decoded, items))


def _spell(key: str, number: int) -> str:
    return f"{key!r} of parameter group {number - 1}" if number else f"its attribute {key!r}"
