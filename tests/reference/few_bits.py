"""The oracle for means in few bits: steps 1 to 7 of the two-phase exchange, in float32, for one vector.

Blocks of 1024 values, the last filled up with zeros, share a scale c = max|g| / L (1 where that is 0); a value is sent
as round(g / c), ties to even. Worker j averages slice j, which has the blocks from floor(B j / m) on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


def rounded(g: Vector, bits: int) -> Vector:
    """Return what a receiver gets of a vector whose length is a multiple of 1024."""
    if bits == 16:  # bfloat16: the upper half of a float32, rounded to even
        words = g.view(np.uint32).astype(np.uint64)
        low = words % 65536
        up = (low > 32768) | ((low == 32768) & (words // 65536 % 2 == 1))
        return ((words // 65536 + up) * 65536).astype(np.uint32).view(np.float32)
    result = np.empty_like(g)
    for start in range(0, len(g), 1024):
        block = g[start : start + 1024]
        c = np.float32(np.max(np.abs(block)) / np.float32({8: 127, 4: 7}[bits]))
        c = np.float32(1) if c == 0 else c
        result[start : start + 1024] = c * np.round(block / c).astype(np.float32)
    return result


def mean_of_differences(
    anchor: Vector, x: list[Vector], e: list[Vector], s: list[Vector], weights: list[float], bits: int
) -> tuple[Vector, list[Vector], list[Vector]]:
    """Return Delta (n,), the new e of all workers, and the new s of all slices.

    anchor, x[i], e[i]: (n,); s[j]: the length of slice j in whole blocks.
    """
    m, n = len(x), len(anchor)
    blocks = -(-n // 1024)
    g = [np.pad((anchor - x[i]) + e[i], (0, 1024 * blocks - n)) for i in range(m)]
    g = [gi if w else np.zeros_like(gi) for gi, w in zip(g, weights, strict=True)]
    sent = [rounded(gi, bits) for gi in g]
    delta, rests = [], []
    for j in range(m):
        part = slice(1024 * (blocks * j // m), 1024 * (blocks * (j + 1) // m))
        total = sent[0][part] * np.float32(weights[0])
        for i in range(1, m):
            total = total + sent[i][part] * np.float32(weights[i])
        r = total / np.float32(sum(weights)) + s[j]
        q = rounded(r, bits)
        delta.append(q)
        rests.append(r - q)
    owed = [(gi - si)[:n] if w else ei for gi, si, ei, w in zip(g, sent, e, weights, strict=True)]
    return np.concatenate(delta)[:n], owed, rests


def sharded_step(
    anchor: Vector, x: list[Vector], e: list[Vector], v: list[Vector], s: list[Vector], bits: int, beta: float
) -> tuple[Vector, list[Vector], list[Vector], list[Vector]]:
    """Return the new anchor, e, v and s where worker j takes the outer step of slice j, with equal weights.

    alpha = 1 and a constant rate. v[j], s[j]: the length of slice j in whole blocks.
    """
    m, n = len(x), len(anchor)
    blocks = -(-n // 1024)
    g = [np.pad((anchor - x[i]) + e[i], (0, 1024 * blocks - n)) for i in range(m)]
    sent = [rounded(gi, bits) for gi in g]
    new, momenta, rests = [], [], []
    for j in range(m):
        start, stop = 1024 * (blocks * j // m), 1024 * (blocks * (j + 1) // m)
        total = sent[0][start:stop]
        for i in range(1, m):
            total = total + sent[i][start:stop]
        old = np.pad(anchor, (0, 1024 * blocks - n))[start:stop]
        mean = old - total / np.float32(m)
        w = np.float32(beta) * v[j]
        momenta.append(w + (old - mean))
        step = (mean - w) - old
        step = np.where(np.arange(start, stop) < n, step, np.float32(0)) + s[j]
        q = rounded(step, bits)
        new.append(old + q)
        rests.append(step - q)
    owed = [(gi - si)[:n] for gi, si in zip(g, sent, strict=True)]
    return np.concatenate(new)[:n], owed, momenta, rests
