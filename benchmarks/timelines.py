"""Figures of when a worker computes and when its messages travel; shared by the benchmarks that draw one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn


class Span(NamedTuple):
    """An activity of a worker; times in seconds."""

    what: str
    begin: float
    end: float


class Panel(NamedTuple):
    """One part of a figure: activities between the begin of the first step and that of the last."""

    title: str
    spans: Sequence[Span]
    begins: Sequence[float]  # of the steps


class Lane(NamedTuple):
    """The place of an activity in a panel."""

    row: str
    colour: str


COMPUTATION = {
    "forward": Lane("computation", "#56B4E9"),
    "backward": Lane("computation", "#0072B2"),
    "step(), waits included": Lane("computation", "#009E73"),
}


def perceptron() -> nn.Module:
    """Return a perceptron with 6.3 million parameters."""
    return nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 2016), nn.ReLU(), nn.Linear(2016, 74))


def batch_of(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and classes for the perceptron."""
    return torch.randn(size, 1024), torch.randint(74, (size,))


def draw(panels: Sequence[Panel], lanes: Mapping[str, Lane], title: str, path: Path) -> None:
    """Draw the panels below each other.

    Args:
        panels: at least one.
        lanes: by activity; the first row is at the bottom.
        title: of the figure.
        path: of the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    rows = list(dict.fromkeys(lane.row for lane in lanes.values()))
    height = 0.8 + (0.4 + 0.7 * len(rows)) * len(panels)
    figure, axes = plt.subplots(len(panels), 1, figsize=(10, height), sharex=True, layout="constrained", squeeze=False)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        zero, last = panel.begins[0], panel.begins[-1]
        for span in panel.spans:
            if span.end > zero and span.begin < last:
                begin, end = max(span.begin, zero), min(span.end, last)
                row, colour = rows.index(lanes[span.what].row), lanes[span.what].colour
                axis.broken_barh([(begin - zero, end - begin)], (row + 0.1, 0.8), color=colour, edgecolor="white")
        for begin in panel.begins:
            axis.axvline(begin - zero, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=panel.title, yticks=[row + 0.5 for row in range(len(rows))], ylim=(0, len(rows)))
        axis.set_yticklabels(rows)
    axes[-1, 0].set_xlabel("seconds; dotted: a step begins")
    figure.legend(
        handles=[Patch(color=lane.colour, label=what) for what, lane in lanes.items()], loc="outside right upper"
    )
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
