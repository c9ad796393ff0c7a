"""Checks of what the workers have noted and of what they held."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from soak.diary import TAU

Entries = Sequence[dict[str, Any]]

LAST = 10
"""Losses at the end, of which the median counts."""


def compare(everything: Entries) -> tuple[int, list[str]]:
    """Return how many outer steps, averages and joins were compared, and after which workers were not bitwise equal.

    Within an epoch of workers that came together at the same step: an older checkpoint that is loaded, or other workers
    before, may have taken the same step.
    """
    places: dict[tuple[Any, ...], dict[str, str]] = defaultdict(dict)
    for entry in everything:
        if entry["kind"] in ("outer", "average", "join", "common"):
            key = repr(entry["since"]), entry["kind"], entry["step"]
            places[key].setdefault(f"{entry['host']}/{entry['process']}", entry["digest"])
    several = {key: digests for key, digests in places.items() if len(digests) > 1}
    unequal = [f"{key}: {digests}" for key, digests in several.items() if len(set(digests.values())) > 1]
    return len(several), unequal


def losses(everything: Entries) -> list[tuple[int, float]]:
    """Return the steps of the averages and the losses there, in the order of time."""
    averages = sorted((entry for entry in everything if entry["kind"] == "average"), key=lambda entry: entry["time"])
    return [(entry["step"], entry["loss"]) for entry in averages]


def last_losses(found: Sequence[tuple[int, float]], step: float = float("inf")) -> list[float]:
    """Return the last losses of a job, up to a step."""
    return [loss for at, loss in found if at <= step][-LAST:]


def lost_steps(everything: Entries) -> tuple[int, int]:
    """Return how often a survivor came together with others, and how many of its own steps were lost by that.

    A survivor's count of steps does not go back, and its own steps in a block that goes on still count.
    """
    survived, lost = 0, 0
    for entry in everything:
        if entry["kind"] == "change" and entry["before"][0] > 0:
            survived += 1
            before, own = entry["before"]
            lost += max(0, before - entry["step"])
            if entry["step"] // TAU == before // TAU:
                lost += max(0, own - entry["own"])
    return survived, lost


def longest_pause(everything: Entries) -> float:
    """Return the most seconds between two outer steps or joins of the job."""
    moments = sorted(entry["time"] for entry in everything if entry["kind"] in ("outer", "join"))
    return max((later - earlier for earlier, later in pairwise(moments)), default=float("inf"))


def seconds_of_block(everything: Entries, periods: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the median seconds of a block: within these periods of time, and outside of them."""
    by_process: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in everything:
        if entry["kind"] == "outer":
            by_process[entry["process"]].append(entry)
    inside, outside = [], []
    for outer in by_process.values():
        for one, two in pairwise(outer):
            if two["step"] - one["step"] == TAU and one["since"] == two["since"]:
                slow = any(begin <= one["time"] and two["time"] <= end for begin, end in periods)
                (inside if slow else outside).append(two["time"] - one["time"])
    return tuple(median(each) if each else float("nan") for each in (inside, outside))


def growth(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return, of the process that grew most, its last third by its second third, at equal numbers of workers.

    Processes of 30 samples count, and numbers of workers that it has five samples of in both thirds.
    """
    by_process: dict[float, list[dict[str, float]]] = defaultdict(list)
    for sample in samples:
        by_process[sample["process"]].append(sample)
    found: dict[str, float] = {}
    for each in by_process.values():
        third = len(each) // 3
        for workers in {sample["workers"] for sample in each}:
            before, after = (
                [sample for sample in part if sample["workers"] == workers]
                for part in (each[third : 2 * third], each[2 * third :])
            )
            if len(each) < 30 or min(len(before), len(after)) < 5:
                continue
            for what in ("memory", "files", "threads"):
                ratio = median(s[what] for s in after) / median(s[what] for s in before)
                found[what] = max(found.get(what, 0), ratio)
    return found
