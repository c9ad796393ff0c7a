"""A topology as text and as a figure, with the speed at which it brings the workers together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from hvd_slowmo.topology import push_sum
from hvd_slowmo.topology.analysis import moves_weights, out_degree, spectral_gap, steps_to_consensus
from hvd_slowmo.topology.graphs import Array

_LINES_PER_STEP = 8
_PANELS = 12
_EXACT = 1e-9


def title_of(name: str, array: Array, whole: Array) -> str:
    """Return the title of a topology.

    Args:
        name: of the topology.
        array: over the nodes.
        whole: over the workers.
    """
    n, m = array.shape[1], whole.shape[1]
    over = f"{m} worker{'s' * (m > 1)}" if n == m else f"{n} node{'s' * (n > 1)} of {m // n} workers"
    return f"{name}, {over}, period {len(whole)}"


def describe(name: str, array: Array, whole: Array) -> str:
    """Return a topology as text.

    Args:
        name: of the topology.
        array: over the nodes.
        whole: over the workers; the same where a node is one worker.

    Example:
        >>> from hvd_slowmo.topology.graphs import full
        >>> print(describe("full", full(2), full(2)).splitlines()[0])
        full, 2 workers, period 1
    """
    lines = [title_of(name, array, whole)]
    for k, matrix in enumerate(whole):
        lines += [f"step {k}", *(f"  {line}" for line in _senders(matrix))]
    messages = out_degree(whole)
    near, exact = steps_to_consensus(array), steps_to_consensus(array, _EXACT)
    lines += [
        f"spectral gap over the period   {spectral_gap(array):.4g}",
        f"steps to consensus             {exact}, exactly the mean"
        if exact <= len(array)
        else f"steps to consensus             {near} to a thousandth of the start's spread, {exact} to a billionth",
        f"messages per worker and step   {messages.mean():.4g}" + _range(messages.min(), messages.max()),
        f"push-sum weight w              {_weights(whole)}",
    ]
    return "\n".join(lines)


def draw(title: str, array: Array, path: str) -> None:
    """Draw a panel per step, the workers on a circle, and write the figure to a file of a type that matplotlib knows.

    Raises:
        ImportError: matplotlib is not installed.
        OSError, ValueError: the file cannot be written, or its type is not known.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyArrowPatch
    except ImportError as error:
        raise ImportError(f"--out needs matplotlib: pip install matplotlib ({error})") from None

    m, shown = array.shape[1], array[:_PANELS]
    columns = min(len(shown), 4)
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows + 0.5), layout="constrained")
    figure.suptitle(title + (f", the first {_PANELS} steps" if len(array) > _PANELS else ""))
    angle = np.pi / 2 - 2 * np.pi * np.arange(m) / m
    places = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for k, (matrix, axes) in enumerate(zip(shown, figure.subplots(rows, columns, squeeze=False).flat, strict=False)):
        axes.set_title(f"step {k}")
        for j, i in np.argwhere((matrix * (1 - np.eye(m))).T > 0):
            # Bent, so that the two directions of a swap are two arrows.
            style: dict[str, Any] = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=0.12", "mutation_scale": 9}
            arrow = FancyArrowPatch(
                tuple(places[j]), tuple(places[i]), shrinkA=8, shrinkB=8, linewidth=2 * matrix[i, j] + 0.3,
                color="tab:blue", alpha=0.7, **style,
            )  # fmt: skip
            axes.add_patch(arrow)
        axes.scatter(*places.T, s=150 if m <= 32 else 20, color="white", edgecolor="black", zorder=3)
        for i, (x, y) in enumerate(places if m <= 32 else ()):
            axes.text(x, y, str(i), ha="center", va="center", fontsize=7, zorder=4)
        axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
    for axes in figure.axes:
        axes.set_axis_off()
    figure.savefig(path)


def _senders(matrix: Array) -> list[str]:
    """Return the workers' actions at one step in lines, equal ones in one."""
    m = len(matrix)

    def grouped(place: Callable[[int, int], int], sign: str) -> list[str]:
        groups: dict[str, list[int]] = defaultdict(list)
        for j in range(m):
            shares: dict[str, list[int]] = defaultdict(list)
            for i in np.flatnonzero(matrix[:, j]).tolist():
                if i != j:
                    shares[_fraction(matrix[i, j])].append(place(i, j))
            sent = [f"{share} to {_whom(whom, m, sign)}" for share, whom in sorted(shares.items())]
            what = f"keep {_fraction(matrix[j, j])}, send {'; '.join(sent)}" if sent else "keep all"
            groups[what].append(j)
        return [f"{_runs(workers) if len(workers) < m else 'all'} {what}" for what, workers in groups.items()]

    # By the way on the circle or by name: whichever is shorter. Swaps read best as -1 and +1, hops as sent: +8 of 12.
    half = (m - 1) // 2 if np.array_equal(matrix, matrix.T) else 0
    hops, names = grouped(lambda i, j: (i - j + half) % m - half, "+d"), grouped(lambda i, j: i, "d")
    lines = min(hops, names, key=len)
    more = len(lines) - _LINES_PER_STEP
    return lines if more <= 0 else [*lines[:_LINES_PER_STEP], f"... and {more} more"]


def _whom(workers: list[int], m: int, sign: str) -> str:
    if len(workers) == m - 1 > 1:
        return "each other"
    return ", ".join(f"{worker:{sign}}" for worker in sorted(workers, key=lambda i: (abs(i), -i)))


def _runs(numbers: Sequence[int]) -> str:
    """Return 0, 1, 2, 3, 7 as "0-3, 7", and 1, 3, 5, 7 as "1, 3, ..., 7"."""
    steps = set(np.diff(numbers).tolist())
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _fraction(share: float) -> str:
    simple = Fraction(share).limit_denominator(1000)
    return str(simple) if abs(float(simple) - share) < 1e-12 else f"{share:.4g}"


def _range(least: int, most: int) -> str:
    return "" if least == most else f" on average, {least} to {most}"


def _weights(array: Array) -> str:
    """Return the range of the weights over many steps from 1, with synchronous mixing and with mixing one step late."""
    parts, m = push_sum.parts(array), array.shape[1]
    prompt = late = np.ones((m, 1))
    arriving, seen = np.zeros((m, 1)), []
    for step in range(max(100, 4 * len(array))):
        k = step % len(array)
        prompt = push_sum.mixed(parts.kept[k], parts.sent[k], prompt)
        late, arriving = push_sum.mixed_late(parts.kept[k], parts.sent[k], late, arriving)
        seen.append([prompt, late])
    low, high = np.min(seen, axis=(0, 2, 3)), np.max(seen, axis=(0, 2, 3))
    moves = f"moves between {low[0]:.4g} and {high[0]:.4g}" if moves_weights(array) else "stays 1"
    return f"{moves}; with overlap between {low[1]:.4g} and {high[1]:.4g}"
