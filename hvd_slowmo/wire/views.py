"""Views: the shape and orientation of a framework's own tensor on the wire.

Where PyTorch and Keras keep a tensor differently, the wire has PyTorch's orientation, so that a PyTorch worker permutes
nothing. Where one framework keeps several tensors of the other in one, the wire has the finer cut: each of its tensors
is a whole one of the framework, or a part of one.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.wire.boxes import Box, boxes

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """A box of the framework's own tensor, and the elements of it that belong to a stretch of the wire.

    `own[box].reshape(shape).transpose(axes).reshape(-1)[start:stop]` is the next stop - start elements of the stretch.
    """

    box: Box  # of the own tensor, with steps of 1
    shape: Shape  # into which the box is reshaped,
    axes: Shape  # permuted so,
    start: int  # flattened, and cut from here
    stop: int  # to here

    @property
    def size(self) -> int:
        """Number of elements of the stretch that are in the box."""
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """True if all elements of the box belong to the stretch, so that writing needs no reading."""
        return self.size == math.prod(self.shape)

    @property
    def permuted(self) -> Shape:
        """The box's shape after the permutation."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def back(self) -> Shape:
        """The permutation that undoes `axes`."""
        return _inverse(self.axes)

    @property
    def extent(self) -> Shape:
        """The box's shape in the own tensor."""
        return tuple(part.stop - part.start for part in self.box)


@dataclass(frozen=True)
class View:
    """The map from the elements of a framework's own tensor to those of a tensor on the wire.

    The part of the own tensor (all of it by default) is reshaped to `shape`, permuted by `axes`, reshaped to `wire`.

    Args:
        own: shape of the own tensor.
        shape: splits the part's axes, none of them across two: (6, 5) into (2, 3, 5), but not into (15, 2).
        axes: a permutation, as numpy.transpose takes it.
        wire: shape on the wire.
        part: per own axis (start, stop); None for the whole tensor.

    Raises:
        TypeError: a shape is no tuple of integers.
        ValueError: the shapes don't fit.

    Example:
        >>> View.permute((3, 2), (1, 0)).to_wire(np.arange(6).reshape(3, 2)).tolist()
        [[0, 2, 4], [1, 3, 5]]
    """

    own: Shape
    shape: Shape
    axes: Shape
    wire: Shape
    part: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        lists = [("own", self.own), ("shape", self.shape), ("axes", self.axes), ("wire", self.wire)]
        if self.part is not None and not isinstance(self.part, tuple):
            raise TypeError(f"`part` must be a tuple of axes or None. Received: {reprlib.repr(self.part)}")
        lists += [(f"part[{n}]", axis) for n, axis in enumerate(self.part or ())]
        for name, numbers in lists:
            if not isinstance(numbers, tuple) or not all(isinstance(n, int) and n >= 0 for n in numbers):
                raise TypeError(f"`{name}` must be a tuple of integers >= 0. Received: {reprlib.repr(numbers)}")
        if self.part is not None and (
            any(len(axis) != 2 for axis in self.part)
            or len(self.part) != len(self.own)
            or not all(0 <= start <= stop <= n for (start, stop), n in zip(self.part, self.own, strict=True))
        ):
            raise ValueError(f"part {self.part} does not lie within shape {self.own}.")
        if sorted(self.axes) != list(range(len(self.shape))):
            raise ValueError(f"axes {self.axes} is not a permutation of the {len(self.shape)} axes of {self.shape}.")
        if math.prod(self.wire) != math.prod(self.shape):
            raise ValueError(f"wire shape {self.wire} and shape {self.shape} have different numbers of elements.")
        _groups(self.extent, self.shape)

    @classmethod
    def same(cls, shape: Sequence[int]) -> View:
        """Return the view that changes nothing."""
        return cls.permute(shape, range(len(shape)))

    @classmethod
    def permute(cls, shape: Sequence[int], axes: Sequence[int], wire: Sequence[int] | None = None) -> View:
        """Return the view that permutes the axes, then reshapes to `wire` if given."""
        shape, axes = tuple(shape), tuple(axes)
        if wire is None:
            wire = [shape[axis] for axis in axes] if max(axes, default=-1) < len(shape) else shape
        return cls(shape, shape, axes, tuple(wire))

    @classmethod
    def rows(cls, shape: Sequence[int], start: int, stop: int) -> View:
        """Return the view of rows start .. stop - 1."""
        shape = tuple(shape)
        part = ((start, stop), *((0, n) for n in shape[1:]))
        wire = (stop - start, *shape[1:])
        return cls(shape, wire, tuple(range(len(shape))), wire, part)

    @property
    def size(self) -> int:
        """Number of elements on the wire."""
        return math.prod(self.wire)

    @cached_property
    def extent(self) -> Shape:
        """Shape of the part."""
        return self.own if self.part is None else tuple(stop - start for start, stop in self.part)

    @property
    def starts(self) -> Shape:
        """Start of the part, per own axis."""
        return tuple(0 for _ in self.own) if self.part is None else tuple(start for start, _ in self.part)

    @cached_property
    def whole(self) -> bool:
        """True if the part is the own tensor."""
        return self.extent == self.own

    @cached_property
    def in_order(self) -> bool:
        """True if the part's elements, row-major, are the wire's in their order."""
        moved = [axis for axis in self.axes if self.shape[axis] != 1]
        return moved == sorted(moved)

    @cached_property
    def offset(self) -> int | None:
        """Start of the wire's elements in the flattened own tensor if they lie there as one stretch, else None."""
        if not self.in_order:
            return None
        if not self.size:
            return 0
        offset, cut = 0, False  # before an axis that is cut, only one row may be left
        for n, start, m in zip(self.own, self.starts, self.extent, strict=True):
            if cut and m != n:
                return None
            cut = cut or m != 1
            offset = offset * n + start
        return offset

    @property
    def identity(self) -> bool:
        """True if the flattened own tensor is the flattened wire tensor."""
        return self.whole and self.in_order

    def to_wire(self, own: NDArray[Any]) -> NDArray[Any]:
        """Return the wire's tensor of an own tensor of shape `own`."""
        self._check(own.shape, self.own, "own")
        wire: NDArray[Any] = own[self._box].reshape(self.shape).transpose(self.axes).reshape(self.wire)
        return wire

    def to_own(self, wire: NDArray[Any], own: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return the own tensor of a wire tensor.

        Args:
            own: has the values outside the part, and is not changed. Needed if the part is not the whole tensor.
        """
        self._check(wire.shape, self.wire, "wire")
        permuted = tuple(self.shape[axis] for axis in self.axes)
        part: NDArray[Any] = wire.reshape(permuted).transpose(_inverse(self.axes)).reshape(self.extent)
        if self.whole:
            return part
        if own is None:
            raise ValueError("the view shows a part of the own tensor only: give `own` for the rest.")
        self._check(own.shape, self.own, "own")
        result: NDArray[Any] = own.copy()
        result[self._box] = part
        return result

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield elements start .. stop - 1 of the flattened wire tensor, in their order, as boxes of the own tensor.

        There are as many boxes as `boxes` yields. Each holds elements of the stretch alone or, where the permutation
        splits an own axis, a few rows around them.
        """
        groups = _groups(self.extent, self.shape)
        permuted = tuple(self.shape[axis] for axis in self.axes)
        back = _inverse(self.axes)
        for box, _ in boxes(permuted, start, stop):
            full = (*box, *(slice(0, n) for n in permuted[len(box) :]))
            wanted = [full[at] for at in back]  # per axis of `shape`
            held = [slice(0, 1) for _ in self.shape]
            own_box = []
            for own_start, group in zip(self.starts, groups, strict=True):
                first, length = 0, 1
                for place, axis in enumerate(group):
                    n = self.shape[axis]
                    if length == 1:
                        # One row so far: what is wanted of this axis is one stretch of the own axis.
                        held[axis] = wanted[axis]
                    else:
                        held[axis] = slice(0, n)
                    length *= held[axis].stop - held[axis].start
                    first += held[axis].start * math.prod(self.shape[a] for a in group[place + 1 :])
                own_box.append(slice(own_start + first, own_start + first + length))
            shape = tuple(part.stop - part.start for part in held)
            begin, inside = 0, 1
            for axis in self.axes:
                begin = begin * shape[axis] + wanted[axis].start - held[axis].start
                inside *= wanted[axis].stop - wanted[axis].start
            yield Piece(tuple(own_box), shape, self.axes, begin, begin + inside)

    def read(self, own: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
        """Return elements start .. stop - 1 of the flattened wire tensor: shape (stop - start,)."""
        parts = [
            own[p.box].reshape(p.shape).transpose(p.axes).reshape(-1)[p.start : p.stop]
            for p in self.pieces(start, stop)
        ]
        return np.concatenate(parts) if parts else np.empty(0, own.dtype)

    def write(self, own: NDArray[Any], start: int, stop: int, value: NDArray[Any]) -> None:
        """Assign elements start .. stop - 1 of the flattened wire tensor in place; `value` has that length."""
        at = 0
        for p in self.pieces(start, stop):
            flat = own[p.box].reshape(p.shape).transpose(p.axes).reshape(-1).copy()
            flat[p.start : p.stop] = value[at : at + p.size]
            own[p.box] = flat.reshape(p.permuted).transpose(p.back).reshape(p.extent)
            at += p.size

    def inverse(self) -> View:
        """Return the view from the wire's tensor to the own one.

        Raises:
            ValueError: the view shows a part only, or its wire shape cuts the permuted axes elsewhere.
        """
        if not self.whole:
            raise ValueError("the view of a part has no inverse.")
        permuted = tuple(self.shape[axis] for axis in self.axes)
        common = _refine(permuted, self.wire)
        return View(self.wire, common, self._order(permuted, common), self.own)

    def then(self, other: View) -> View:
        """Return this view followed by `other`, whose own shape is this one's wire shape.

        Raises:
            ValueError: the shapes differ, `other` shows a part, or the two together are not one permutation of axes.
        """
        if self.wire != other.own or not other.whole:
            raise ValueError(f"a view of shape {other.own} can't follow one that gives {self.wire}.")
        permuted = tuple(self.shape[axis] for axis in self.axes)
        common = _refine(permuted, other.shape)
        order, groups = self._order(permuted, common), _groups(other.shape, common)
        wanted = [a for axis in other.axes for a in groups[axis]]
        wanted += [a for a in range(len(common)) if a not in wanted]
        at = {axis: number for number, axis in enumerate(order)}
        shape, axes = tuple(common[a] for a in order), tuple(at[a] for a in wanted)
        return View(self.own, shape, axes, other.wire, self.part)

    def split(self, dims: Sequence[int]) -> View:
        """Return the view of a tensor whose first axis is a flattened feature map of shape `dims`, channels last.

        On the wire the feature map is flattened channels first, as PyTorch does it.

        Raises:
            ValueError: the first axis is no such feature map.
        """
        dims = tuple(dims)
        if not self.own or not self.whole or self.shape != self.own or math.prod(dims) != self.own[0]:
            raise ValueError(f"the first axis of shape {self.own} is not a flattened feature map of shape {dims}.")
        last = len(dims) - 1
        axes = [a for axis in self.axes for a in ((last, *range(last)) if axis == 0 else (axis + last,))]
        return View(self.own, (*dims, *self.own[1:]), tuple(axes), self.wire)

    @property
    def orientation(self) -> str:
        """The view in words."""
        parts = []
        if not self.whole:
            cut = zip(self.own, self.starts, self.extent, strict=True)
            parts.append("[" + ", ".join(_spell_slice(*axis) for axis in cut) + "]")
        if not self.in_order:
            if self.shape != self.extent:
                parts.append(f"as {'x'.join(map(str, self.shape))}")
            parts.append(f"axes {' '.join(map(str, self.axes))}")
        return " ".join(parts) or "same"

    def _order(self, permuted: Shape, common: Shape) -> Shape:
        """Return the axes of `common`, which splits those of `permuted`, in the order of the own tensor."""
        groups = _groups(permuted, common)
        order = [axis for place in _inverse(self.axes) for axis in groups[place]]
        return (*order, *(axis for axis in range(len(common)) if axis not in order))

    @property
    def _box(self) -> Box:
        return tuple(slice(start, start + n) for start, n in zip(self.starts, self.extent, strict=True))

    @staticmethod
    def _check(received: Shape, expected: Shape, which: str) -> None:
        if received != expected:
            raise ValueError(f"the {which} tensor must have shape {expected}. Received: {received}")


def _groups(whole: Shape, split: Shape) -> list[Shape]:
    """Return, per axis of `whole`, the axes of `split` that make it up. Axes of length 1 may belong to none."""
    groups, axis = [], 0
    for n in whole:
        group, product = [], 1
        while product != n and axis < len(split):
            group.append(axis)
            product *= split[axis]
            axis += 1
        if product != n:
            break
        groups.append(tuple(group))
    if len(groups) < len(whole) or any(n != 1 for n in split[axis:]):
        raise ValueError(f"shape {split} does not split the axes of shape {whole}.")
    return groups


def _refine(a: Shape, b: Shape) -> Shape:
    """Return the coarsest shape that splits the axes of both."""
    if 0 in a or 0 in b:
        if a == b:
            return a
        raise ValueError(f"shapes {a} and {b} have no common refinement.")
    marks = sorted({math.prod(s[i:]) for s in (a, b) for i in range(len(s) + 1)}, reverse=True)
    if any(big % small for big, small in pairwise(marks)):
        raise ValueError(f"shapes {a} and {b} have no common refinement.")
    return tuple(big // small for big, small in pairwise(marks))


def _inverse(axes: Shape) -> Shape:
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))


def _spell_slice(n: int, start: int, extent: int) -> str:
    return ":" if extent == n else f"{start}:{start + extent}"
