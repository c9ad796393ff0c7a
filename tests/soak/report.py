"""The results of the soak, as numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median, pstdev
from typing import NamedTuple

from soak import link
from soak.checks import (
    compare,
    growth,
    last_losses,
    longest_pause,
    losses,
    lost_steps,
    seconds_of_block,
)
from soak.diary import TAU, entries
from soak.faults import slow_periods
from soak.job import Job

MOST_GROWTH = {"memory": 1.1, "files": 2, "threads": 2}
"""Of what a process holds, from its second third to its last: see `soak.checks.growth`."""

LONGEST_PAUSE_S = 180.0
"""Without an outer step: a worker hangs for twice the time limit, and a newcomer is slow to start."""


class Report(NamedTuple):
    """The outcome of one job."""

    framework: str
    minutes: float
    processor: float  # minutes of all its processes
    status: int | None  # of the launcher; None: it had to be killed
    faults: Counter[str]
    obeyed: Counter[str]  # orders that a worker has obeyed before it was lost
    changes: int  # times that the workers came together, seen by the one that saw most of them
    seconds: list[float]  # from noticing a loss to training again, where nobody was new
    pause: float  # longest time without an outer step
    compared: int  # outer steps, averages and joins that two or more workers have noted
    unequal: list[str]  # those after which they were not bitwise equal
    survived: int  # times that a survivor came together with others
    lost: list[str]  # where a survivor has lost steps by that
    behind: int  # times that a survivor skipped to the others' block
    killed: int  # workers, with at most a block of their own each
    losses: list[float]  # the last ones
    undisturbed: list[float]  # those of a job to which nothing was done, at the same step or its last
    growth: dict[str, float]  # of what a process holds: `soak.checks.growth`
    shared: list[str]  # files that were left in /dev/shm
    block: tuple[float, float]  # seconds of one, on the slow link and on the free one
    ends: int  # workers that came to the end together
    last: int  # workers that came together last
    saves: Counter[str]
    errors: list[str]  # of saves and loads

    @property
    def noise(self) -> float:
        """Loss above the undisturbed one that is no difference: three standard deviations of either, or 10 %."""
        spread = math.hypot(pstdev(self.losses), pstdev(self.undisturbed))
        return max(3 * spread, 0.1 * median(self.undisturbed))

    @property
    def faultless(self) -> bool:
        """True if nothing was lost but what must be, and there was something to lose."""
        kept = not self.unequal and not self.lost and not self.shared and self.saves["unsaved"] <= self.obeyed["full"]
        bounded = all(value <= MOST_GROWTH[what] for what, value in self.growth.items())
        as_good = bool(self.losses) and median(self.losses) < median(self.undisturbed) + self.noise
        happened = self.compared > 0 and bool(self.faults) and self.ends == self.last
        return self.status == 0 and self.pause < LONGEST_PAUSE_S and happened and kept and bounded and as_good

    def lines(self) -> list[str]:
        """Return the report in words."""
        came = f"median {median(self.seconds):.1f} s, longest {max(self.seconds):.1f} s" if self.seconds else "none"
        growth = ", ".join(f"{what} {value:.3g}" for what, value in self.growth.items())
        slow, free = self.block
        of_link = (
            f"{slow:.2f} s at {link.RATE}, {free:.2f} s else"
            if link.allowed()
            else (f"{free:.2f} s; the rate of the link can't be changed here (`unshare --net` and `tc`), so it was not")
        )
        loss = (
            f"{median(self.losses):.3f}, undisturbed {median(self.undisturbed):.3f}, noise {self.noise:.3f}"
            if self.losses
            else "none"
        )
        return [
            f"{self.framework}: {self.minutes:.1f} minutes, {self.processor:.1f} of processor time, "
            f"status {self.status}; {self.ends} workers at the end",
            f"  faults: {_counts(self.faults)}",
            f"  obeyed by a worker: {_counts(self.obeyed)}",
            f"  the workers came together {self.changes} times; after a loss they went on in: {came}",
            f"  longest time without an outer step: {self.pause:.0f} s",
            f"  outer steps, averages, joins and changes compared: {self.compared}; "
            f"not bitwise equal: {len(self.unequal)}",
            *(f"    {each}" for each in self.unequal[:5]),
            f"  survivors lost steps in {len(self.lost)} cases of {self.survived}, and skipped to the others' block in "
            f"{self.behind}; {self.killed} lost workers' own blocks of {TAU} steps",
            *(f"    {each}" for each in self.lost[:5]),
            f"  saves and loads: {_counts(self.saves)}",
            *(f"    {each}" for each in self.errors[:5]),
            f"  loss at the end: {loss}",
            f"  growth of a process, memory as a ratio, others as a difference: {growth or 'none lived long enough'}",
            f"  left in /dev/shm: {len(self.shared)} {' '.join(self.shared[:5])}",
            f"  a block takes {of_link}",
        ]


def report(
    job: Job,
    framework: str,
    minutes: float,
    processor: float,
    done: Sequence[tuple[float, str]],
    undisturbed: Sequence[tuple[int, float]],
) -> Report:
    """Return what has become of a job that has ended.

    Args:
        job: that has ended.
        framework: its.
        minutes, processor: that it took.
        done: when and what was done to it.
        undisturbed: `soak.checks.losses` of a job to which nothing was done.
    """
    everything = list(entries(job.folder))
    compared, unequal = compare(everything)
    survived, lost = lost_steps(everything)
    changes = [entry for entry in everything if entry["kind"] == "change"]
    found = losses(everything)
    hosts = {entry["host"] for entry in everything} | {entry["host"] + "," for entry in everything}
    saves = {(e["kind"], e["epoch"]) for e in everything if e["kind"] in ("save", "unsaved", "load", "unloaded")}
    return Report(
        framework,
        minutes,
        processor,
        job.status,
        Counter(" ".join(word for word in line.split() if word not in hosts) for _, line in done),
        Counter(entry["what"] for entry in everything if entry["kind"] == "obeyed"),
        max(Counter(change["host"] for change in changes).values(), default=0),
        [c["seconds"] for c in changes if c["step"] > 0 and not c["newcomers"]],
        longest_pause(everything),
        compared,
        unequal,
        survived,
        lost,
        sum(change["rank"] in change["behind"] for change in changes),
        sum(any(word in line for word in ("killed", "ended", "hang")) for _, line in done),
        last_losses(found),
        last_losses(undisturbed, found[-1][0] if found else 0) or last_losses(undisturbed),
        growth(everything),
        job.left_in_shared_memory(),
        seconds_of_block(everything, slow_periods(done)),
        sum(entry["kind"] == "end" for entry in everything),
        max(changes, key=lambda change: change["time"])["workers"] if changes else 0,
        Counter(kind for kind, _ in saves),
        sorted({entry["error"][:150] for entry in everything if "error" in entry}),
    )


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(counter.items())) or "none"
