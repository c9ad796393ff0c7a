"""The results of the soak, as numbers and as a figure."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from soak.diary import entries
from soak.job import Job

MOST_GROWTH = {"memory": 1.5, "files": 3.0, "threads": 3.0}
"""Of what a process holds, from its second third to its last: connections come with workers, memory with a trace."""

WORST_LOSS = 0.05
"""Accuracy below that of an undisturbed job, which trains for a shorter time."""


class Report(NamedTuple):
    """The outcome of one job."""

    framework: str
    minutes: float
    status: int | None  # of the launcher; None: it had to be killed
    faults: dict[str, int]
    changes: int  # times that the workers came together, seen by the one that saw most of them
    seconds: list[float]  # from noticing a loss to training again, where nobody was new
    compared: int  # outer steps and joins that two or more workers have noted
    unequal: list[str]  # those after which they were not bitwise equal
    accuracy: float  # median of the last ten
    undisturbed: float
    growth: dict[str, float]  # of what a process holds, its last third by its second third; the worst process
    ends: int  # workers that came to the end together
    last: int  # workers that came together last
    saves: dict[str, int]

    @property
    def faultless(self) -> bool:
        """True if nothing was lost but what must be, and there was something to lose."""
        bounded = all(value < MOST_GROWTH[what] for what, value in self.growth.items())
        as_good = self.accuracy > self.undisturbed - WORST_LOSS
        happened = self.compared > 0 and bool(self.faults) and self.ends == self.last
        return self.status == 0 and happened and not self.unequal and bounded and as_good

    def lines(self) -> list[str]:
        """Return the report in words."""
        came = f"median {median(self.seconds):.1f} s, longest {max(self.seconds):.1f} s" if self.seconds else "none"
        faults = ", ".join(f"{count} x {what}" for what, count in sorted(self.faults.items()))
        growth = ", ".join(f"{what} {value:.2f}" for what, value in self.growth.items())
        saves = ", ".join(f"{count} x {what}" for what, count in sorted(self.saves.items()))
        return [
            f"{self.framework}: {self.minutes:.1f} minutes, status {self.status}; {self.ends} workers at the end",
            f"  faults: {faults or 'none'}",
            f"  the workers came together {self.changes} times; after a loss they went on in: {came}",
            f"  outer steps, joins and changes compared: {self.compared}; not bitwise equal: {len(self.unequal)}",
            *(f"    {each}" for each in self.unequal[:5]),
            f"  saves and loads: {saves}",
            f"  test accuracy {100 * self.accuracy:.1f} %, undisturbed {100 * self.undisturbed:.1f} %",
            f"  growth of a process from its second third to its last: {growth or 'no process lived long enough'}",
        ]


def report(job: Job, framework: str, minutes: float, status: int | None, done: list[str], undisturbed: float) -> Report:
    """Return what has become of a job."""
    everything = list(entries(job.folder))
    compared, unequal = compare(everything)
    changes = [entry for entry in everything if entry["kind"] == "change"]
    by_host: dict[str, int] = defaultdict(int)
    for change in changes:
        by_host[change["host"]] += 1
    faults: dict[str, int] = defaultdict(int)
    for line in done:
        faults[" ".join(word for word in line.split() if word not in _hosts(everything))] += 1
    saves: dict[str, int] = defaultdict(int)
    for entry in everything:
        if entry["kind"] in ("save", "unsaved", "load", "unloaded"):
            saves[entry["kind"]] += 1
    return Report(
        framework,
        minutes,
        status,
        dict(faults),
        max(by_host.values(), default=0),
        [c["seconds"] for c in changes if c["step"] > 0 and not c["newcomers"]],
        compared,
        unequal,
        accuracy(everything),
        undisturbed,
        growth(job.samples),
        sum(entry["kind"] == "end" for entry in everything),
        max(changes, key=lambda change: change["time"])["workers"] if changes else 0,
        dict(saves),
    )


def _hosts(everything: list[dict[str, Any]]) -> set[str]:
    return {entry["host"] for entry in everything} | {entry["host"] + "," for entry in everything}


def compare(everything: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """Return how many outer steps and joins were compared, and after which of them workers were not bitwise equal.

    Within an epoch of workers that came together at the same step: an older checkpoint that is loaded, or other workers
    before, may have taken the same step.
    """
    places: dict[tuple[Any, ...], dict[str, str]] = defaultdict(dict)
    for entry in everything:
        if entry["kind"] in ("outer", "join", "common"):
            key = repr(entry["since"]), entry["kind"], entry["step"]
            places[key].setdefault(f"{entry['host']}/{entry['process']}", entry["digest"])
    several = {key: digests for key, digests in places.items() if len(digests) > 1}
    unequal = [f"{key}: {digests}" for key, digests in several.items() if len(set(digests.values())) > 1]
    return len(several), unequal


def accuracy(everything: list[dict[str, Any]]) -> float:
    """Return the median of the last ten accuracies; NaN if there is none."""
    found = [entry for entry in everything if entry["kind"] == "accuracy"]
    last = sorted(found, key=lambda entry: entry["step"])[-10:]
    return median([entry["accuracy"] for entry in last]) if last else float("nan")


def growth(samples: list[dict[str, float]]) -> dict[str, float]:
    """Return, of the process that grew most, its last third by its second third; processes of 30 samples count."""
    by_process: dict[float, list[dict[str, float]]] = defaultdict(list)
    for sample in samples:
        by_process[sample["process"]].append(sample)
    long = [each for each in by_process.values() if len(each) >= 30]
    found = {}
    for what in ("memory", "files", "threads"):
        ratios = [
            median(s[what] for s in each[2 * len(each) // 3 :])
            / median(s[what] for s in each[len(each) // 3 : 2 * len(each) // 3])
            for each in long
        ]
        if ratios:
            found[what] = max(ratios)
    return found


def figure(job: Job, done: list[tuple[float, str]], path: Path) -> None:
    """Draw the accuracy, the number of workers and the memory over the time, with the faults."""
    import matplotlib.pyplot as plt

    everything = list(entries(job.folder))
    began = min(entry["time"] for entry in everything)
    _, (top, middle, bottom) = plt.subplots(3, 1, sharex=True, figsize=(9, 6), height_ratios=(2, 1, 1))
    found = sorted((e["time"] - began, e["accuracy"]) for e in everything if e["kind"] == "accuracy")
    top.plot(*zip(*found, strict=True), ".", markersize=3)
    for moment, _line in done:
        top.axvline(moment - began, color="0.85", linewidth=0.8)
    changes = sorted((e["time"] - began, e["workers"]) for e in everything if e["kind"] == "change")
    middle.step(*zip(*changes, strict=True), where="post")
    for process in {sample["process"] for sample in job.samples}:
        own = [(s["time"] - began, s["memory"] / 2**20) for s in job.samples if s["process"] == process]
        bottom.plot(*zip(*own, strict=True), linewidth=0.8)
    top.set(ylabel="test accuracy", title="grey: faults")
    middle.set(ylabel="workers")
    bottom.set(ylabel="memory of each, MiB", xlabel="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=120, bbox_inches="tight")
    plt.close()
