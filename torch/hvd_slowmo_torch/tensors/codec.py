"""The codes of few bits on PyTorch tensors; the same bytes and values as the core's, bitwise, in fewer passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvd_slowmo.core.parts.codec import LEVELS, Coded, Elementwise, blocks_of, payload_bytes, tiles
from hvd_slowmo.core.parts.layout import BLOCK

EXACT = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}
"""Types of PyTorch's own in which values travel."""


class TorchCodec:
    """`hvd_slowmo.core.parts.codec.Codec` on PyTorch tensors.

    Args:
        tile: blocks to work on at a time.
    """

    def __init__(self, tile: int | None = 256) -> None:
        self.tile = tile

    def compute(self, vector: Elementwise, first: int, last: int) -> torch.Tensor:
        pieces = [vector.piece(start, stop) for start, stop in self._tiles(first, last)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # `finish` asks for a tile at a time

    def encode(self, vector: Elementwise, first: int, last: int, bits: int) -> torch.Tensor:
        return self._message(vector, first, last, bits)

    def encode_with_rest(
        self, vector: Elementwise, first: int, last: int, bits: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rests: list[torch.Tensor] = []
        message = self._message(vector, first, last, bits, rests)
        return message, torch.cat(rests)

    def _message(
        self, vector: Elementwise, first: int, last: int, bits: int, rests: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return the message, and add what rounding withholds of each piece to `rests`."""
        message = torch.empty(0, dtype=torch.uint8)
        for start, stop in self._tiles(first, last):
            piece = self.padded(vector.piece(start, stop), (stop - start) * BLOCK)
            if start == first:
                size = payload_bytes((last - first) * BLOCK, bits)
                message = torch.empty(size, dtype=torch.uint8, device=piece.device)
            within = start - first, stop - first
            self._write(piece, message, *within, bits)
            if rests is not None:
                rests.append(piece - self.decode(self.cut(message, bits, *within), bits))
        return message

    def _tiles(self, first: int, last: int) -> Sequence[tuple[int, int]]:
        """Return at least one: an empty tile still tells type and device."""
        return list(tiles(self, first, last)) or [(first, last)]

    def _write(self, piece: torch.Tensor, message: torch.Tensor, first: int, last: int, bits: int) -> None:
        """Write the code of a piece to its place in the message."""
        if bits in EXACT:
            message.view(EXACT[bits])[first * BLOCK : last * BLOCK] = piece
        else:
            self._encode(piece.view(-1, BLOCK), message, blocks_of(message, bits), first, last, bits)

    def _encode(self, rows: torch.Tensor, message: torch.Tensor, blocks: int, first: int, last: int, bits: int) -> None:
        scales = message[: 4 * blocks].view(torch.float32)
        codes = message[4 * blocks :].view(blocks, BLOCK * bits // 8)
        q = torch.abs(rows)
        c = torch.amax(q, 1).div_(LEVELS[bits])  # a norm of PyTorch's takes ten times as long
        c.masked_fill_(c == 0, 1)
        scales[first:last] = c
        torch.div(rows, c[:, None], out=q).round_()
        if bits == 8:
            codes[first:last].view(torch.int8).copy_(q)
            return
        # Two values as one number, low + 16 high, which float32 holds exactly: bytes need no shifts then.
        pairs = q.add_(8).view(len(rows), BLOCK // 2, 2)
        codes[first:last] = torch.add(pairs[:, :, 0], pairs[:, :, 1], alpha=16)

    def cut(self, message: torch.Tensor, bits: int, first: int = 0, last: int | None = None) -> Coded:
        blocks = blocks_of(message, bits)
        last = blocks if last is None else last
        row = BLOCK * bits // 8
        if bits in EXACT:
            return (message[first * row : last * row],)
        scales = message[4 * first : 4 * last].clone().view(torch.float32)  # a copy, which is aligned
        return scales, message[4 * blocks + first * row : 4 * blocks + last * row]

    def cut_all(self, messages: Sequence[torch.Tensor], bits: int) -> Coded:
        return tuple(torch.cat(each) for each in zip(*(self.cut(m, bits) for m in messages), strict=True))

    def decode(self, coded: Coded, bits: int) -> torch.Tensor:
        codes: torch.Tensor = coded[-1]
        if bits in EXACT:
            values = codes.view(EXACT[bits])
            return values.float() if bits == 16 else values
        if bits == 8:
            values = codes.view(torch.int8).float()
        else:
            values = torch.stack([codes & 15, codes >> 4], dim=1).float().sub_(8)
        return values.view(-1, BLOCK).mul_(coded[0][:, None]).view(-1)

    def padded(self, g: torch.Tensor, elements: int) -> torch.Tensor:
        return g if len(g) == elements else torch.nn.functional.pad(g, (0, elements - len(g)))
