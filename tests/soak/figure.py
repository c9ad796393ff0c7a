"""The soak as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from soak.diary import entries
from soak.faults import slow_periods
from soak.job import Job


def figure(job: Job, done: Sequence[tuple[float, str]], path: Path) -> None:
    """Draw the loss, the number of workers and the memory over the time, with the faults."""
    import matplotlib.pyplot as plt

    everything = list(entries(job.folder))
    began, end = (which(entry["time"] for entry in everything) for which in (min, max))
    _, (top, middle, bottom) = plt.subplots(3, 1, sharex=True, figsize=(9, 6), height_ratios=(2, 1, 1))
    found = sorted((e["time"] - began, e["loss"]) for e in everything if e["kind"] == "average")
    top.plot(*zip(*found, strict=True), ".", markersize=3)
    for moment, _line in done:
        top.axvline(moment - began, color="0.85", linewidth=0.8)
    for start, stop in slow_periods(done):
        top.axvspan(start - began, min(stop, end) - began, color="C1", alpha=0.15, linewidth=0)
    changes = sorted((e["time"] - began, e["workers"]) for e in everything if e["kind"] == "change")
    middle.step(*zip(*changes, strict=True), where="post")
    joins = [e for e in everything if e["kind"] == "join"]
    for process in {e["process"] for e in joins}:
        own = [(e["time"] - began, e["memory"] / 2**20) for e in joins if e["process"] == process]
        bottom.plot(*zip(*own, strict=True), linewidth=0.8)
    top.set(ylabel="test loss", yscale="log", title="grey: faults; orange: a link of 1 Gbit/s")
    middle.set(ylabel="workers")
    bottom.set(ylabel="memory of each, MiB", xlabel="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=120, bbox_inches="tight")
    plt.close()
