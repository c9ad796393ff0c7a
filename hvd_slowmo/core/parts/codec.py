"""Few bits per value: the codes in which differences travel, as pure functions on NumPy arrays.

8 and 4 bits: blocks of 1024 values share a float32 scale c = max|g| / L with L = 127 or 7 (1 where that is 0), and a
value travels as q = round(g / c), ties to even; it is decoded as c q. 16 bits: bfloat16, rounded to even, no scales.
32 and 64 bits: float32 and float64 as they are.
Other frameworks have faster forms of these functions, which give the same bytes and the same values, bitwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.core.parts.slices import BLOCK

LEVELS = {8: 127, 4: 7}


def payload_bytes(elements: int, bits: int) -> int:
    """Return the length of a message with so many elements, a multiple of the block.

    Example:
        >>> payload_bytes(2048, 8), payload_bytes(2048, 4), payload_bytes(2048, 16)
        (2056, 1032, 4096)
    """
    return elements * bits // 8 + (elements // BLOCK * 4 if bits in LEVELS else 0)


class Codec(Protocol):
    """Encoding of vectors in whole blocks, as flat tensors of a framework: float32, or float64 with 64 bits."""

    tile: int | None
    """Blocks to work on at a time, so that a processor's cache holds the temporaries; None: all at once."""

    def encode(self, pieces: Iterable[Any], blocks: int, bits: int) -> Any:
        """Return the message (uint8) for a vector of so many blocks: all scales, then all values.

        Args:
            pieces: of the vector, in order, each of `tile` blocks or, the last one, fewer.
        """

    def decode(self, message: Any, bits: int, first: int = 0, last: int | None = None) -> Any:
        """Return blocks first .. last - 1 of the vector of a message."""

    def decode_all(self, messages: Sequence[Any], bits: int) -> Any:
        """Return the vectors of several messages, end to end."""

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
        >>> message = codec.encode([g], 1, 8)
        >>> len(message), bool(abs(codec.decode(message, 8) - g).max() < 1 / 254)
        (1028, True)
    """

    tile: int | None = None

    def encode(self, pieces: Iterable[NDArray[Any]], blocks: int, bits: int) -> NDArray[np.uint8]:
        g = np.concatenate(list(pieces))
        if bits >= 32:
            return g.astype(f"<f{bits // 8}").view(np.uint8)
        if bits == 16:
            raw = g.view(np.uint32)
            rounded = raw + 0x7FFF + ((raw >> 16) & 1)
            return (rounded >> 16).astype("<u2").view(np.uint8)
        rows = g.reshape(blocks, BLOCK)
        scales = np.abs(rows).max(axis=1) / np.float32(LEVELS[bits])
        scales[scales == 0] = 1
        values = np.rint(rows / scales[:, None]).astype(np.int8).reshape(-1)
        if bits == 4:
            unsigned = (values + 8).astype(np.uint8)
            codes = unsigned[0::2] | (unsigned[1::2] << 4)
        else:
            codes = values.view(np.uint8)
        return np.concatenate([scales.astype("<f4").view(np.uint8), codes])

    def decode(self, message: NDArray[np.uint8], bits: int, first: int = 0, last: int | None = None) -> NDArray[Any]:
        blocks = blocks_of(message, bits)
        if bits >= 32:
            values = np.frombuffer(message.tobytes(), f"<f{bits // 8}").reshape(blocks, BLOCK)
            exact: NDArray[Any] = values[first:last].reshape(-1)
            return exact
        if bits == 16:
            whole = (message.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(blocks, BLOCK)
        else:
            scales = np.frombuffer(message[: 4 * blocks].tobytes(), "<f4")
            codes = message[4 * blocks :]
            if bits == 4:
                values = np.stack([codes & 15, codes >> 4], axis=1).astype(np.int8) - np.int8(8)
            else:
                values = codes.view(np.int8)
            whole = values.reshape(blocks, BLOCK) * scales[:, None]
        result: NDArray[np.float32] = whole[first:last].astype(np.float32).reshape(-1)
        return result

    def decode_all(self, messages: Sequence[NDArray[np.uint8]], bits: int) -> NDArray[Any]:
        return np.concatenate([self.decode(message, bits) for message in messages])

    def padded(self, g: NDArray[Any], elements: int) -> NDArray[Any]:
        return np.concatenate([g, np.zeros(elements - len(g), g.dtype)])
