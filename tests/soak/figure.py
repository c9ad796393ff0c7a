"""The figure of the soak."""

from __future__ import annotations

from pathlib import Path

from soak.diary import entries
from soak.faults import Faults
from soak.job import Job


def figure(job: Job, faults: Faults, path: Path) -> None:
    """Draw the loss, the number of workers and the memory over the time, with the faults."""
    import matplotlib.pyplot as plt

    everything = list(entries(job.folder))
    began = min(entry["time"] for entry in everything)
    _, (top, middle, bottom) = plt.subplots(3, 1, sharex=True, figsize=(9, 6), height_ratios=(2, 1, 1))
    found = sorted((e["time"] - began, e["loss"]) for e in everything if e["kind"] == "average")
    top.plot(*zip(*found, strict=True), ".", markersize=3)
    for moment, _line in faults.done:
        top.axvline(moment - began, color="0.85", linewidth=0.8)
    for first, last in faults.slow_periods:
        top.axvspan(first - began, last - began, color="0.93")
    changes = sorted((e["time"] - began, e["workers"]) for e in everything if e["kind"] == "change")
    middle.step(*zip(*changes, strict=True), where="post")
    for process in {sample["process"] for sample in job.samples}:
        own = [(s["time"] - began, s["memory"] / 2**20) for s in job.samples if s["process"] == process]
        bottom.plot(*zip(*own, strict=True), linewidth=0.8)
    top.set(ylabel="test loss", yscale="log", title="grey: faults; bands: the slow link")
    middle.set(ylabel="workers")
    bottom.set(ylabel="memory of each, MiB", xlabel="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=120, bbox_inches="tight")
    plt.close()
