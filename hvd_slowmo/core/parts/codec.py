"""Few bits per value: the codes in which differences travel, as pure functions on NumPy arrays.

8 and 4 bits: blocks of 1024 values share a float32 scale c = max|g| / L with L = 127 or 7 (1 where that is 0), and a
value travels as q = round(g / c), ties to even; it is decoded as c q. 16 bits: bfloat16, rounded to even, no scales.
32 and 64 bits: float32 and float64 as they are.
Other frameworks have faster forms of these functions, which give the same bytes and the same values, bitwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.core.parts.layout import BLOCK

LEVELS = {8: 127, 4: 7}


def payload_bytes(elements: int, bits: int) -> int:
    """Return the length of a message with so many elements, a multiple of the block.

    Example:
        >>> payload_bytes(2048, 8), payload_bytes(2048, 4), payload_bytes(2048, 16)
        (2056, 1032, 4096)
    """
    return elements * bits // 8 + (elements // BLOCK * 4 if bits in LEVELS else 0)


Source = Callable[[int, int], Any]
"""Returns a vector's blocks from the first to the one before the last: values, or `Coded`."""


class Elementwise(NamedTuple):
    """A vector of whole blocks that is a function of others, element by element: computed in pieces, where it is used.

    Attributes:
        function: takes the scalars, then a piece of each source. It depends on nothing else, but may be a method.
        sources: the others. Of values, a vector's last block may have fewer.
        scalars: the same for all pieces.

    Example:
        >>> g = np.arange(2 * BLOCK)
        >>> twice = Elementwise(np.multiply, (blocks_in(g),), (2,))
        >>> twice.piece(1, 2)[:3].tolist()
        [2048, 2050, 2052]
    """

    function: Callable[..., Any]
    sources: Sequence[Source]
    scalars: tuple[Any, ...] = ()

    def piece(self, first: int, last: int) -> Any:
        """Return blocks first .. last - 1."""
        return self.function(*self.scalars, *[source(first, last) for source in self.sources])


def blocks_in(values: Any) -> Source:
    """Return a source of `Elementwise`: the blocks of a flat tensor."""
    return lambda first, last: values[first * BLOCK : last * BLOCK]


def plain(values: Any) -> Elementwise:
    """Return a flat tensor as it is, to be encoded."""
    return Elementwise(_itself, (blocks_in(values),))


def _itself(piece: Any) -> Any:
    return piece


Coded = tuple[Any, ...]
"""Blocks as they travel: their scales, if they have any, and the bytes of their values."""


class Codec(Protocol):
    """Encoding of vectors in whole blocks, as flat tensors of a framework: float32, or float64 with 64 bits."""

    tile: int | None
    """Blocks to work on at a time, so that a processor's cache holds the temporaries; None: all at once."""

    def compute(self, vector: Elementwise, first: int, last: int) -> Any:
        """Return blocks first .. last - 1 of a vector; a last block that is not whole stays so."""

    def encode(self, vector: Elementwise, first: int, last: int, bits: int) -> Any:
        """Return the message (uint8) of blocks first .. last - 1: all scales, then all values.

        A last block that is not whole is filled up with zeros.
        """

    def encode_with_rest(self, vector: Elementwise, first: int, last: int, bits: int) -> tuple[Any, Any]:
        """Return the message as `encode`, and what rounding withholds of the blocks."""

    def cut(self, message: Any, bits: int, first: int = 0, last: int | None = None) -> Coded:
        """Return blocks first .. last - 1 of a message."""

    def cut_all(self, messages: Sequence[Any], bits: int) -> Coded:
        """Return the blocks of several messages, one after the other."""

    def decode(self, coded: Coded, bits: int) -> Any:
        """Return the values of blocks."""

    def padded(self, g: Any, elements: int) -> Any:
        """Return a vector filled up with zeros to so many elements."""


def tiles(codec: Codec, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the blocks first .. last - 1 in tiles: the first block of each and the one behind its last.

    Example:
        >>> list(tiles(NumpyCodec(), 2, 5))
        [(2, 5)]
    """
    length = codec.tile or max(1, last - first)
    for start in range(first, last, length):
        yield start, min(start + length, last)


def blocks_of(message: Any, bits: int) -> int:
    """Return the number of blocks in a message."""
    return int(message.shape[0]) // payload_bytes(BLOCK, bits)


class NumpyCodec:
    """`Codec` on NumPy arrays: the definition.

    Example:
        >>> codec = NumpyCodec()
        >>> g = np.linspace(-1, 1, BLOCK, dtype=np.float32)
        >>> message = codec.encode(plain(g), 0, 1, 8)
        >>> len(message), bool(abs(codec.decode(codec.cut(message, 8), 8) - g).max() < 1 / 254)
        (1028, True)
    """

    tile: int | None = None

    def compute(self, vector: Elementwise, first: int, last: int) -> NDArray[Any]:
        values: NDArray[Any] = vector.piece(first, last)
        return values

    def encode(self, vector: Elementwise, first: int, last: int, bits: int) -> NDArray[np.uint8]:
        g = self.padded(vector.piece(first, last), (last - first) * BLOCK)
        if bits >= 32:
            return g.astype(f"<f{bits // 8}").view(np.uint8)
        if bits == 16:
            raw = g.view(np.uint32)
            rounded = raw + 0x7FFF + ((raw >> 16) & 1)
            return (rounded >> 16).astype("<u2").view(np.uint8)
        rows = g.reshape(-1, BLOCK)
        scales = np.abs(rows).max(axis=1) / np.float32(LEVELS[bits])
        scales[scales == 0] = 1
        values = np.rint(rows / scales[:, None]).astype(np.int8).reshape(-1)
        if bits == 4:
            unsigned = (values + 8).astype(np.uint8)
            codes = unsigned[0::2] | (unsigned[1::2] << 4)
        else:
            codes = values.view(np.uint8)
        return np.concatenate([scales.astype("<f4").view(np.uint8), codes])

    def encode_with_rest(
        self, vector: Elementwise, first: int, last: int, bits: int
    ) -> tuple[NDArray[np.uint8], NDArray[Any]]:
        values = self.padded(vector.piece(first, last), (last - first) * BLOCK)
        message = self.encode(plain(values), 0, last - first, bits)
        return message, values - self.decode(self.cut(message, bits), bits)

    def cut(self, message: NDArray[np.uint8], bits: int, first: int = 0, last: int | None = None) -> Coded:
        blocks = blocks_of(message, bits)
        codes = (
            message[4 * blocks if bits in LEVELS else 0 :].reshape(blocks, BLOCK * bits // 8)[first:last].reshape(-1)
        )
        return (message[: 4 * blocks].view("<f4")[first:last], codes) if bits in LEVELS else (codes,)

    def cut_all(self, messages: Sequence[NDArray[np.uint8]], bits: int) -> Coded:
        return tuple(np.concatenate(each) for each in zip(*(self.cut(m, bits) for m in messages), strict=True))

    def decode(self, coded: Coded, bits: int) -> NDArray[Any]:
        codes = coded[-1]
        if bits >= 32:
            exact: NDArray[Any] = codes.view(f"<f{bits // 8}")
            return exact
        if bits == 16:
            rounded: NDArray[np.float32] = (codes.view("<u2").astype(np.uint32) << 16).view(np.float32)
            return rounded
        if bits == 4:
            values = np.stack([codes & 15, codes >> 4], axis=1).astype(np.int8) - np.int8(8)
        else:
            values = codes.view(np.int8)
        result: NDArray[np.float32] = (values.reshape(-1, BLOCK) * coded[0][:, None]).astype(np.float32)
        return result.reshape(-1)

    def padded(self, g: NDArray[Any], elements: int) -> NDArray[Any]:
        return np.concatenate([g, np.zeros(elements - len(g), g.dtype)])
