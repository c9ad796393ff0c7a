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


def lost_steps(everything: Entries) -> tuple[int, list[str]]:
    """Return how often a survivor came together with others, and where steps of its own were lost by that.

    A survivor's count of steps does not go back, and its own steps in a block that goes on still count.
    """
    survived, cases = 0, []
    for entry in everything:
        if entry["kind"] == "change" and entry["before"][0] > 0:
            survived += 1
            before, own = entry["before"]
            lost = max(0, before - entry["step"])
            if entry["step"] // TAU == before // TAU:
                lost += max(0, own - entry["own"])
            if lost:
                now = entry["step"], entry["own"]
                cases.append(f"{lost} on {entry['host']}, at (step, own in the block) {before, own}, then {now}")
    return survived, cases


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


def growth(everything: Entries) -> dict[str, float]:
    """Return how much more a process held after the joins of its last third than after those of its second third.

    Memory as a ratio, descriptors and threads as a difference, of the process that grew most: medians at equal numbers
    of workers, where it has noted five joins in both thirds.
    """
    by_process: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in everything:
        if entry["kind"] == "join":
            by_process[entry["process"]].append(entry)
    found: dict[str, float] = {}
    for joins in by_process.values():
        third = len(joins) // 3
        for workers in {_workers(join) for join in joins}:
            before, after = (
                [join for join in part if _workers(join) == workers]
                for part in (joins[third : 2 * third], joins[2 * third :])
            )
            if min(len(before), len(after)) < 5:
                continue
            for what in ("memory", "files", "threads"):
                one, two = (median(join[what] for join in part) for part in (before, after))
                found[what] = max(found.get(what, 0), two / one if what == "memory" else two - one)
    return found


def _workers(join: dict[str, Any]) -> int:
    """Return the number of workers, of when they came together; see the scripts' `since`."""
    return int(join["since"][1])
