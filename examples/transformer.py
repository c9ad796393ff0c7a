"""A transformer (Vaswani et al., arXiv 1706.03762) for translation, in PyTorch, with normalization before each part."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

PAD, UNKNOWN, BEGIN, END = range(4)
"""Numbers of the special pieces."""

Keys = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of an attention: (batch, heads, length, width of a head)."""


class Attention(nn.Module):
    """Attention of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)

    def keys(self, memory: torch.Tensor) -> Keys:
        """Return keys and values of a sequence (batch, length, width)."""
        key, value = self.key_value(memory).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(
        self, x: torch.Tensor, keys: Keys, mask: torch.Tensor | None = None, causal: bool = False
    ) -> torch.Tensor:
        """Return the values that x asks for. mask: True where a key may be seen."""
        y = F.scaled_dot_product_attention(self._split(self.query(x)), *keys, attn_mask=mask, is_causal=causal)
        return self.output(y.transpose(1, 2).flatten(2))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def feed_forward(width: int, dropout: float) -> nn.Sequential:
    """Return the two linear layers at the end of each layer."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * width, width))


class EncoderLayer(nn.Module):
    """Attention to the source, then two linear layers."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.own, self.feed = Attention(width, heads), feed_forward(width, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](x)
        x = x + self.dropout(self.own(y, self.own.keys(y), mask))
        return x + self.dropout(self.feed(self.norms[1](x)))


class DecoderLayer(nn.Module):
    """Attention to what has been written, attention to the source, then two linear layers."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.own, self.other = Attention(width, heads), Attention(width, heads)
        self.feed = feed_forward(width, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, source: Keys, mask: torch.Tensor, past: Keys | None = None
    ) -> tuple[torch.Tensor, Keys]:
        """Return the output for x, and the keys of all positions so far. past: those before x, of which it has one."""
        y = self.norms[0](x)
        keys = self.own.keys(y)
        if past is not None:
            keys = torch.cat([past[0], keys[0]], dim=2), torch.cat([past[1], keys[1]], dim=2)
        x = x + self.dropout(self.own(y, keys, causal=past is None))
        x = x + self.dropout(self.other(self.norms[1](x), source, mask))
        return x + self.dropout(self.feed(self.norms[2](x))), keys


class Transformer(nn.Module):
    """Encoder and decoder of one vocabulary, whose embedding is also the output layer.

    Args:
        pieces: size of the vocabulary.
        width: of the model, a multiple of 2 * heads.
        layers: of the encoder, and of the decoder.
        heads: of each attention.
        dropout: after each part.
    """

    def __init__(self, pieces: int, width: int, layers: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(pieces, width, padding_idx=PAD)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, dropout) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, length of target, pieces) of the piece after each of `target`; both are padded."""
        memory, mask = self.encode(source)
        x = self._embed(target, 0)
        for layer, keys in zip(self.decoder, memory, strict=True):
            x, _ = layer(x, keys, mask)
        return F.linear(self.norms[1](x), self.embedding.weight)

    def encode(self, source: torch.Tensor) -> tuple[list[Keys], torch.Tensor]:
        """Return the keys of the source for each layer of the decoder, and where it is not padding."""
        mask = (source != PAD)[:, None, None]
        x = self._embed(source, 0)
        for layer in self.encoder:
            x = layer(x, mask)
        x = self.norms[0](x)
        return [layer.other.keys(x) for layer in self.decoder], mask

    @torch.no_grad()
    def translate(self, source: torch.Tensor) -> list[list[int]]:
        """Return the most likely piece after the other, up to END or twice the length of the source."""
        memory, mask = self.encode(source)
        last = torch.full((len(source), 1), BEGIN, device=source.device)
        pasts: list[Keys | None] = [None] * len(self.decoder)
        written = []
        ended = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        for position in range(2 * source.shape[1] + 10):
            x = self._embed(last, position)
            for number, layer in enumerate(self.decoder):
                x, pasts[number] = layer(x, memory[number], mask, pasts[number])
            last = F.linear(self.norms[1](x), self.embedding.weight).argmax(dim=-1)
            written.append(last)
            ended |= last[:, 0] == END
            if ended.all():
                break
        rows = torch.cat(written, dim=1).tolist()
        return [row[: row.index(END)] if END in row else row for row in rows]

    def _embed(self, pieces: torch.Tensor, first: int) -> torch.Tensor:
        position = torch.arange(first, first + pieces.shape[1], device=pieces.device)[:, None]
        frequency = torch.exp(-math.log(10_000) * torch.arange(0, self.width, 2, device=pieces.device) / self.width)
        waves = torch.cat([torch.sin(position * frequency), torch.cos(position * frequency)], dim=1)
        return self.dropout(self.embedding(pieces) * self.width**0.5 + waves)
