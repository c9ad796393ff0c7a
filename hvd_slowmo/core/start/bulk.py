"""One worker's tensors for others, apart from the layout: frozen parameters and inner optimizers' state, bitwise.

A gather pickles, and every worker holds all items at once: it is for small things. So the workers gather a list of the
tensors, with the content of small ones, and the bytes of the others follow as sums to which all but the giver
contribute zeros. Integers add up exactly whatever the bytes mean, where floating-point sums would change -0.0 and NaN.
Tensors of zeros, such as the moments of an optimizer before its first step, do not travel.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core.parts.layout import spans
from hvd_slowmo.errors import SharedError, raise_together, share

Bytes = NDArray[np.uint8]

PIECE_BYTES = 4 * 2**20
"""Length of a sum: shorter than a step's chunks, because some frameworks hold four copies of it at a time."""

SMALL_BYTES = 1024
"""Length up to which a tensor is a part of the gathered list."""


class Body(Protocol):
    """A tensor as bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def read(self, start: int, stop: int) -> Bytes:
        """Return a stretch of the bytes; it is not kept."""

    def write(self, start: int, values: Bytes) -> None:
        """Set a stretch of the bytes. Stretches come in their order, without a gap."""

    def close(self) -> None:
        """Free what reading has needed, or finish what has been written in full."""


class WholeArray:
    """The `Body` of a tensor that its framework gives and takes as a whole NumPy array.

    Args:
        dtype: of the array.
        shape: of the array.
        get: returns the array.
        put: takes the array.
    """

    def __init__(
        self,
        dtype: Any,
        shape: Sequence[int],
        get: Callable[[], NDArray[Any]],
        put: Callable[[NDArray[Any]], None],
    ) -> None:
        self._type = np.dtype(dtype)
        self.dtype, self.shape = self._type.name, tuple(shape)
        self.nbytes = math.prod(self.shape) * self._type.itemsize
        self._get, self._put = get, put
        self._array: NDArray[Any] | None = None
        self._written = False

    def read(self, start: int, stop: int) -> Bytes:
        if self._array is None:
            self._array = np.ascontiguousarray(self._get(), self._type)
        return _bytes_of(self._array)[start:stop]

    def write(self, start: int, values: Bytes) -> None:
        if self._array is None:
            self._array = np.empty(self.shape, self._type)
            self._written = True
        _bytes_of(self._array)[start : start + len(values)] = values

    def close(self) -> None:
        if self._written:
            assert self._array is not None, "written"
            self._put(self._array)
        self._array, self._written = None, False


class Carrier(Protocol):
    """An adapter's tensors on their way."""

    def sum_words(self, comm: ScopedComm, name: str, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the sum over the workers of `comm`, which may lie in the memory of `words`. A collective."""

    def body(self, item: Any) -> Body | None:
        """Return the bytes of a tensor; None for anything that pickle carries as it is."""

    def new(self, dtype: str, shape: tuple[int, ...]) -> Any:
        """Return a new tensor in host memory, for which `body` returns one."""


@dataclass(frozen=True)
class Gift:
    """One worker's tensors and values; on the others, where they go.

    Attributes:
        named: tensors that all of them have already, in one order: they are written in place.
        values: returns anything else, with tensors in it; called on the giver alone.
        make_room: frees what the values will replace, on the others.
    """

    named: Mapping[str, Body] = field(default_factory=dict)
    values: Callable[[], Any] = lambda: None
    make_room: Callable[[], None] = lambda: None


class Parcel(NamedTuple):
    """A gift from one worker.

    Attributes:
        giver: its rank in the `Comm`.
        gift: returns the worker's own side of it; None on workers that it is not for.
    """

    giver: int
    gift: Callable[[], Gift] | None


class _Label(NamedTuple):
    """A tensor in the gathered list."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    content: bytes | None  # b"": zeros; None: it follows


class _Manifest(NamedTuple):
    """A worker's part in a parcel, as it is gathered; the last three are the giver's alone."""

    names: str  # digest of names, types and shapes of the named tensors
    error: SharedError | None = None  # it can't give
    named: Mapping[str, _Label] = {}
    values: bytes = b""  # for the framework of the giver to unpickle
    within: Sequence[_Label] = ()  # the tensors in the values

    @property
    def labels(self) -> tuple[_Label, ...]:
        return (*self.named.values(), *self.within)


def give(comm: ScopedComm, name: str, parcels: Sequence[Parcel], carrier: Carrier) -> list[Any]:
    """Hand out parcels. A collective.

    Args:
        comm: all workers, also those that no parcel is for.
        name: of the collectives; the sums are NAME.bytes.
        parcels: the same on every worker, except for their gifts.
        carrier: of the adapter.

    Returns:
        The values of each parcel; None where this worker is the giver, or the parcel is not for it.

    Raises:
        Exception: on every worker of one type, if a giver can't give; the text names its rank.
        ValueError: on every worker, if the named tensors of two workers differ.
    """
    gifts: list[Gift | None] = []
    bodies: list[list[Body]] = []
    manifests: list[_Manifest | None] = []
    error: Exception | None = None
    for giver, make in parcels:
        gift: Gift | None = None
        travelling: list[Body] = []
        manifest: _Manifest | None = None
        try:
            gift = None if make is None else make()
            manifest = None if gift is None else _Manifest(_digest(_forms(gift.named)))
            if gift is not None and giver == comm.rank:
                manifest, travelling = _packed(gift, carrier)
        except Exception as caught:  # whatever it is, the other workers wait in the gather and must hear of it
            error = error or caught
            manifest = _Manifest("", share(caught))
        gifts.append(gift)
        bodies.append(travelling)
        manifests.append(manifest)
    everyone: list[list[_Manifest | None]] = comm.gather(name, manifests)
    failed = [
        (rank, next(manifest.error for manifest in each if manifest is not None and manifest.error is not None))
        for rank, each in zip(comm.ranks, everyone, strict=True)
        if any(manifest is not None and manifest.error is not None for manifest in each)
    ]
    raise_together(comm.name, failed, comm.size, error)
    _compare(comm, parcels, gifts, everyone)
    results = []
    for number, (giver, _) in enumerate(parcels):
        sent = everyone[giver][number]
        assert sent is not None, "a giver has its own gift"
        gift = None if giver == comm.rank else gifts[number]
        new: list[Any] = []
        if gift is not None:
            gift.make_room()
            new += [carrier.new(label.dtype, label.shape) for label in sent.within]
            bodies[number] = _opened(sent, [*gift.named.values(), *(_body_of(each, carrier) for each in new)])
        sizes = [label.nbytes for label in sent.labels if label.content is None]
        _stream(comm, f"{name}.bytes", sizes, bodies[number], gift is not None, carrier)
        results.append(None if gift is None else _Unpickler(io.BytesIO(sent.values), new).load())
    return results


def _packed(gift: Gift, carrier: Carrier) -> tuple[_Manifest, list[Body]]:
    """Return the giver's manifest, and the tensors that follow it."""
    within: list[Body] = []
    file = io.BytesIO()
    _Pickler(file, carrier, within).dump(gift.values())
    named = {key: _label(body) for key, body in gift.named.items()}
    manifest = _Manifest(_digest(_forms(gift.named)), None, named, file.getvalue(), [_label(body) for body in within])
    pairs = zip((*gift.named.values(), *within), manifest.labels, strict=True)
    return manifest, [body for body, label in pairs if label.content is None]


def _opened(sent: _Manifest, bodies: Sequence[Body]) -> list[Body]:
    """Write the tensors that have come with the list; return the others."""
    following = []
    for body, label in zip(bodies, sent.labels, strict=True):
        if label.content is None:
            following.append(body)
            continue
        zeros = bytes(min(label.nbytes, PIECE_BYTES))
        for start, stop in _pieces(label.nbytes):
            body.write(start, np.frombuffer(label.content[start:stop] or zeros[: stop - start], np.uint8))
        body.close()
    return following


def _body_of(tensor: Any, carrier: Carrier) -> Body:
    body = carrier.body(tensor)
    assert body is not None, "new() returns a tensor"
    return body


def _stream(
    comm: ScopedComm, name: str, sizes: Sequence[int], bodies: Sequence[Body], takes: bool, carrier: Carrier
) -> None:
    """Send tensors end to end, or receive them, or look on. A collective.

    Args:
        sizes: of the tensors, in bytes.
        bodies: the tensors; empty on a worker that looks on.
        takes: write them.
    """
    offsets = (0, *accumulate(sizes))
    words = np.zeros(-(-min(offsets[-1], PIECE_BYTES) // 8), np.int64)
    for start in range(0, offsets[-1], PIECE_BYTES):
        stop = min(start + PIECE_BYTES, offsets[-1])
        sent = words[: -(-(stop - start) // 8)]
        sent[:] = 0
        parts = list(spans(offsets, start, stop)) if bodies else []
        if not takes:
            for number, first, last, at in parts:
                sent.view(np.uint8)[at : at + last - first] = bodies[number].read(first, last)
        received = carrier.sum_words(comm, name, sent).view(np.uint8)
        for number, first, last, at in parts:
            if takes:
                bodies[number].write(first, received[at : at + last - first])
            if last == sizes[number]:
                bodies[number].close()


def _compare(
    comm: ScopedComm,
    parcels: Sequence[Parcel],
    gifts: Sequence[Gift | None],
    everyone: Sequence[Sequence[_Manifest | None]],
) -> None:
    """Raise ValueError where a worker would write the tensors of a parcel to others."""
    for number, (giver, _) in enumerate(parcels):
        sent, own = everyone[giver][number], gifts[number]
        assert sent is not None, "a giver has its own gift"
        for place, each in enumerate(everyone):
            manifest = each[number]
            if manifest is None or manifest.names == sent.names:
                continue
            words = f"{comm.name}: rank {comm.ranks[place]} differs from rank {comm.ranks[giver]}"
            if place != comm.rank or own is None:
                raise ValueError(f"{words} in the tensors that are not trained; the error of that rank says in which.")
            raise ValueError(f"{words}: {_difference(_forms(own.named), _forms(sent.named))}")


def _difference(own: Sequence[str], expected: Sequence[str]) -> str:
    for a, b in zip(own, expected, strict=False):
        if a != b:
            return f"of the tensors that are not trained it has {a} where {b} is expected."
    return f"it has {len(own)} tensors that are not trained where {len(expected)} are expected."


def _forms(named: Mapping[str, Body | _Label]) -> list[str]:
    return [f"{key} ({each.dtype}, shape {tuple(each.shape)})" for key, each in named.items()]


def _digest(forms: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(forms).encode()).hexdigest()


def _label(body: Body) -> _Label:
    content: bytes | None = None
    if not any(body.read(start, stop).any() for start, stop in _pieces(body.nbytes)):
        content = b""
    elif body.nbytes <= SMALL_BYTES:
        content = body.read(0, body.nbytes).tobytes()
    body.close()
    return _Label(body.dtype, body.shape, body.nbytes, content)


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, PIECE_BYTES):
        yield start, min(start + PIECE_BYTES, length)


def _bytes_of(array: NDArray[Any]) -> Bytes:
    return array.reshape(-1).view(np.uint8)


class _Pickler(pickle.Pickler):
    """Pickles values with a number in the place of each tensor; a tensor in several places has one."""

    def __init__(self, file: io.BytesIO, carrier: Carrier, tensors: list[Body]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._carrier, self._tensors = carrier, tensors
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # an address is that of one object only while the object lives

    def persistent_id(self, item: Any) -> int | None:
        if id(item) not in self._numbers:
            body = self._carrier.body(item)
            if body is None:
                return None
            self._numbers[id(item)] = len(self._tensors)
            self._alive.append(item)
            self._tensors.append(body)
        return self._numbers[id(item)]


class _Unpickler(pickle.Unpickler):
    """Unpickles values, with tensors in the places of their numbers."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Any]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Any:
        return self._tensors[number]
