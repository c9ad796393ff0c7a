"""The codes of few bits on PyTorch tensors; the same bytes and values as the core's, bitwise, in fewer passes."""

from __future__ import annotations

import torch

from hvd_slowmo.core.codec import BLOCK, LEVELS, payload_bytes

_TILE = 128  # blocks that are worked on at a time, so that a core's cache holds the temporaries


class TorchCodec:
    """`hvd_slowmo.core.codec.Codec` on PyTorch tensors."""

    def encode(self, g: torch.Tensor, bits: int) -> torch.Tensor:
        if bits == 16:
            return g.to(torch.bfloat16).view(torch.uint8)
        rows = g.view(-1, BLOCK)
        message = torch.empty(payload_bytes(len(g), bits), dtype=torch.uint8, device=g.device)
        blocks = len(rows)
        scales = message[: 4 * blocks].view(torch.float32)
        codes = message[4 * blocks :].view(blocks, BLOCK * bits // 8)
        scratch = torch.empty(min(_TILE, blocks), BLOCK, device=g.device)
        for start in range(0, blocks, _TILE):
            tile = rows[start : start + _TILE]
            q = scratch[: len(tile)]
            c = torch.amax(torch.abs(tile, out=q), 1).div_(LEVELS[bits])  # a norm of PyTorch's takes ten times as long
            c.masked_fill_(c == 0, 1)
            scales[start : start + _TILE] = c
            torch.div(tile, c[:, None], out=q).round_()
            if bits == 8:
                codes[start : start + _TILE].view(torch.int8).copy_(q)
            else:
                unsigned = q.add_(8).to(torch.uint8)
                torch.bitwise_or(unsigned[:, 0::2], unsigned[:, 1::2] << 4, out=codes[start : start + _TILE])
        return message

    def decode(self, message: torch.Tensor, bits: int) -> torch.Tensor:
        if bits == 16:
            return message.view(torch.bfloat16).float()
        blocks = len(message) // (4 + BLOCK * bits // 8)
        scales = message[: 4 * blocks].clone().view(torch.float32)  # a copy, which is aligned
        codes = message[4 * blocks :].view(blocks, BLOCK * bits // 8)
        result = torch.empty(blocks, BLOCK, device=message.device)
        for start in range(0, blocks, _TILE):
            tile, code = result[start : start + _TILE], codes[start : start + _TILE]
            if bits == 8:
                tile.copy_(code.view(torch.int8))
            else:
                tile[:, 0::2] = code & 15
                tile[:, 1::2] = code >> 4
                tile.sub_(8)
            tile.mul_(scales[start : start + _TILE, None])
        return result.view(-1)

    def padded(self, g: torch.Tensor, elements: int) -> torch.Tensor:
        return g if len(g) == elements else torch.nn.functional.pad(g, (0, elements - len(g)))
