"""The codes of few bits on PyTorch tensors; the same bytes and values as the core's, bitwise, in fewer passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from hvd_slowmo.core.parts.codec import LEVELS, blocks_of, payload_bytes
from hvd_slowmo.core.parts.slices import BLOCK

EXACT = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}
"""Types of PyTorch's own in which values travel."""


class TorchCodec:
    """`hvd_slowmo.core.parts.codec.Codec` on PyTorch tensors.

    Args:
        tile: blocks to work on at a time.
    """

    def __init__(self, tile: int | None = 256) -> None:
        self.tile = tile

    def encode(self, pieces: Iterable[torch.Tensor], blocks: int, bits: int) -> torch.Tensor:
        message, first = torch.empty(0, dtype=torch.uint8), 0
        for piece in pieces:
            if not first:
                message = torch.empty(payload_bytes(blocks * BLOCK, bits), dtype=torch.uint8, device=piece.device)
            rows = piece.view(-1, BLOCK)
            last = first + len(rows)
            if bits in EXACT:
                message.view(EXACT[bits])[first * BLOCK : last * BLOCK] = piece
            else:
                self._encode(rows, message, blocks, first, last, bits)
            first = last
        return message

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

    def decode(self, message: torch.Tensor, bits: int, first: int = 0, last: int | None = None) -> torch.Tensor:
        blocks = blocks_of(message, bits)
        last = blocks if last is None else last
        if bits in EXACT:
            values = message.view(EXACT[bits])[first * BLOCK : last * BLOCK]
            return values.float() if bits == 16 else values
        scales = message[4 * first : 4 * last].clone().view(torch.float32)  # a copy, which is aligned
        codes = message[4 * blocks :].view(blocks, BLOCK * bits // 8)[first:last]
        if bits == 8:
            values = codes.view(torch.int8).float()
        else:
            values = torch.stack([codes & 15, codes >> 4], dim=2).float().view(last - first, BLOCK).sub_(8)
        return values.mul_(scales[:, None]).view(-1)

    def decode_all(self, messages: Sequence[torch.Tensor], bits: int) -> torch.Tensor:
        return torch.cat([self.decode(message, bits) for message in messages])

    def padded(self, g: torch.Tensor, elements: int) -> torch.Tensor:
        return g if len(g) == elements else torch.nn.functional.pad(g, (0, elements - len(g)))
