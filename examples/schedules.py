"""Learning-rate schedules of the paper as factors of the highest rate, independent of the framework."""

from __future__ import annotations

from collections.abc import Sequence


def step_decay(step: int, total: int, warmup: float, decays: Sequence[float]) -> float:
    """Return the factor for images: a linear warm-up, then a tenth at each decay (Goyal et al., arXiv 1706.02677).

    Args:
        step: inner steps completed.
        total: number of steps of the run.
        warmup: its share of the run.
        decays: shares of the run, ascending.

    Example:
        >>> [round(step_decay(step, 200, 5 / 200, (0.5, 0.75, 0.875)), 3) for step in (0, 4, 99, 100, 150, 199)]
        [0.2, 1.0, 1.0, 0.1, 0.01, 0.001]
    """
    rising = (step + 1) / max(warmup * total, 1)
    return min(rising, 1.0) * 0.1 ** sum(step >= round(decay * total) for decay in decays)


def inverse_square_root(step: int, warmup: int) -> float:
    """Return the factor for a transformer: a linear warm-up, then 1/√step (Vaswani et al., arXiv 1706.03762).

    Args:
        step: inner steps completed.
        warmup: number of steps until the factor is 1.

    Example:
        >>> [inverse_square_root(step, 4) for step in (0, 3, 15)]
        [0.25, 1.0, 0.5]
    """
    return min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)
