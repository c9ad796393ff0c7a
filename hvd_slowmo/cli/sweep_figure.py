"""The figure of a sweep: the metric and the drift over tau for each beta, and a heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvd_slowmo.cli.sweep import Row, Setting, spread_of


def figure_class() -> Any:
    """Return matplotlib's Figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"the figure of a sweep needs matplotlib: pip install matplotlib ({error})") from None
    return Figure


def draw(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Draw a line of panels for each number of workers, and write the figure to a file.

    Args:
        rows: the results.
        metric: its name.
        path: of a type that matplotlib knows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    workers = sorted({row.workers for row in rows})
    figure = figure_class()(figsize=(13, 3.6 * len(workers)), layout="constrained")
    seeds = len({row.seed for row in rows})
    over = f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    figure.suptitle(f"{rows[0].task}, {rows[0].steps} steps, {over}")
    for line, m in zip(figure.subplots(len(workers), 3, squeeze=False), workers, strict=True):
        own = [row for row in rows if row.workers == m]
        _curves(line[0], own, "metric")
        line[0].set(ylabel=f"{metric} of the mean model, {m} workers")
        line[0].legend()
        _heat_map(figure, line[1], own, metric)
        _curves(line[2], own, "drift")
        line[2].set(ylabel="drift from the mean, relative")
    figure.savefig(path, dpi=110)


def _curves(axes: Any, rows: Sequence[Row], column: str) -> None:
    """Plot a column over tau, a line for each beta."""
    for beta in sorted({row.beta for row in rows}):
        taus = sorted({row.tau for row in rows})
        points = [_statistics([getattr(row, column) for row in rows if row.run.setting == (tau, beta)]) for tau in taus]
        means, spreads = zip(*points, strict=True)
        axes.errorbar(taus, means, yerr=spreads, marker="o", capsize=3, label=f"β = {beta:g}")
    axes.set(xlabel="τ", xscale="log")
    axes.set_xticks(taus, [str(tau) for tau in taus], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _heat_map(figure: Any, axes: Any, rows: Sequence[Row], metric: str) -> None:
    taus, betas = sorted({row.tau for row in rows}), sorted({row.beta for row in rows})
    means = [
        [_statistics([row.metric for row in rows if row.run.setting == Setting(tau, beta)])[0] for tau in taus]
        for beta in betas
    ]
    image = axes.imshow(means, origin="lower", aspect="auto", cmap="viridis")
    for y, line in enumerate(means):
        for x, mean in enumerate(line):
            text = "diverged" if math.isnan(mean) else f"{mean:.4g}"
            axes.text(x, y, text, ha="center", va="center", bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0})
    axes.set_xticks(range(len(taus)), [str(tau) for tau in taus])
    axes.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axes.set(xlabel="τ", ylabel="β")
    figure.colorbar(image, ax=axes, label=metric)


def _statistics(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation, 0 for a single value; NaN with one of them."""
    return float(np.mean(values)), spread_of(values) if len(values) > 1 else 0.0
