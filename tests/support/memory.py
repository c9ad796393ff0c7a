"""Memory beside the model: settings, and how many vectors of the model's size they cost on `WORKERS` workers."""

from __future__ import annotations

from typing import Any

WORKERS = 2
SHAPE = (1024, 512)  # 512 blocks of a slice: what fills up the last ones is no matter
TAU = 4

BLOCKING: dict[str, tuple[dict[str, Any], float]] = {
    "Local SGD": ({"alpha": 1.0, "beta": 0.0}, 0),
    "slow rate alone": ({"alpha": 0.5, "beta": 0.0}, 1),
    "32 bits": ({}, 2),
    "8 bits": ({"bits": 8}, 3 + 1 / WORKERS),
    "divided": ({"shard": True}, 2 / WORKERS),
    "8 bits, divided": ({"bits": 8, "shard": True}, 2 + 2 / WORKERS),
}
"""By name, settings beside tau, and vectors: docs/slow-networks.md, "Memory beside the model"."""

LATE: dict[str, tuple[dict[str, Any], float]] = {
    "one fragment": ({"delay": 1}, 1),
    "a fragment per step": ({"fragments": 4, "delay": 1}, 1 / 4),
    "two in flight": ({"fragments": 4, "delay": 2}, 2 / 4),
    "less than a fragment": ({"fragments": 2, "delay": 1}, 1 / 2),
}
"""Settings of late exchanges, to be added to any of `BLOCKING`."""
