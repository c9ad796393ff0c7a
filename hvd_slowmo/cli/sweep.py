"""A sweep over settings: its runs, their results in a CSV file, and the settings that it would choose."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hvd_slowmo.errors import CommandError


class Setting(NamedTuple):
    """Settings that are compared with each other."""

    tau: int
    beta: float


class Run(NamedTuple):
    """One run of a sweep."""

    workers: int
    setting: Setting
    seed: int


class Row(NamedTuple):
    """The results of one run: a row of the CSV file. NaN where a run diverged."""

    task: str
    steps: int
    workers: int
    tau: int
    beta: float
    seed: int
    metric: float
    loss: float
    drift: float
    seconds: float

    @property
    def run(self) -> Run:
        """The run of these results."""
        return Run(self.workers, Setting(self.tau, self.beta), self.seed)


class Results:
    """The results of a sweep, in a file to which each run adds a row as it ends.

    Args:
        path: of the file; if it exists, the sweep goes on from there.
        task: "module:task".
        steps: inner steps of a run.

    Attributes:
        path: of the file.
        rows: by run.

    Raises:
        CommandError: the file is no table of these columns, or one of another task or other steps.
    """

    def __init__(self, path: Path, task: str, steps: int) -> None:
        self.path = path
        self._task, self._steps = task, steps
        self.rows: dict[Run, Row] = {}
        if path.exists():
            self._read()
        else:
            self._append(Row._fields)

    def add(self, run: Run, results: Sequence[float]) -> None:
        """Add a run's metric, loss, drift and seconds."""
        row = Row(self._task, self._steps, run.workers, *run.setting, run.seed, *results)
        self._append([value if isinstance(value, str) else repr(value) for value in row])
        self.rows[run] = row

    def _append(self, values: Sequence[str]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(values)

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        head, *lines = list(csv.reader(whole.splitlines())) or [[]]
        if tuple(head) != Row._fields:
            raise CommandError(f"{self.path} is not a table of a sweep. Move it away, or choose another --out.")
        for number, values in enumerate(lines, start=2):
            try:
                fields: list[Any] = [kind(value) for kind, value in zip(_KINDS, values, strict=True)]
                row = Row(*fields)
            except ValueError as error:
                raise CommandError(f"{self.path}, line {number}: {error}. Correct the line or delete it.") from error
            if (row.task, row.steps) != (self._task, self._steps):
                raise CommandError(
                    f"{self.path} has results of {row.task} with {row.steps} steps, and this sweep is of {self._task} "
                    f"with {self._steps}. Choose another --out."
                )
            self.rows[row.run] = row
        if whole != text:  # the run that wrote the last line was interrupted
            self.path.write_text(whole, encoding="utf-8")


_KINDS: tuple[Callable[[str], str | int | float], ...] = (str, int, int, int, float, int, float, float, float, float)


def runs_of(workers: Sequence[int], settings: Sequence[Setting], seeds: Sequence[int]) -> list[Run]:
    """Return the runs of a sweep: all settings with a seed before the next seed, so that an early end has them all."""
    return [Run(m, setting, seed) for m in workers for seed in seeds for setting in settings]


class Score(NamedTuple):
    """The metric of a setting over the seeds, and its difference from the best setting's, paired by the seeds."""

    setting: Setting
    mean: float  # NaN where a run diverged
    spread: float  # standard deviation over the seeds; NaN for a single one
    behind: float  # mean difference from the best
    error: float  # standard error of that mean; NaN for a single seed
    diverged: int  # number of runs

    @property
    def clearly_behind(self) -> bool:
        """True if the difference from the best is more than two standard errors, or a run has diverged."""
        return bool(self.diverged) or self.behind > 2 * self.error


def ranked(metrics: Mapping[Setting, Sequence[float]]) -> list[Score]:
    """Return the settings from the best to the worst; those of which a run diverged are last.

    Args:
        metrics: of each setting by seed, in the same order of seeds.

    Example:
        >>> best, second = ranked({Setting(4, 0.5): [0.8, 0.9], Setting(12, 0.5): [0.9, 1.0]})
        >>> best.setting.tau, round(second.behind, 12), round(second.error, 12), second.clearly_behind
        (12, 0.1, 0.0, True)
    """

    def order(setting: Setting) -> tuple[int, float]:
        diverged = sum(map(math.isnan, metrics[setting]))
        return diverged, 0.0 if diverged else -float(np.mean(metrics[setting]))

    best, *_ = settings = sorted(metrics, key=order)
    scores = []
    for setting in settings:
        own = metrics[setting]
        away = np.subtract(metrics[best], own)
        mean, spread, error = float(np.mean(own)), spread_of(own), spread_of(away) / math.sqrt(len(own))
        scores.append(Score(setting, mean, spread, float(away.mean()), error, sum(map(math.isnan, own))))
    return scores


def spread_of(values: Any) -> float:
    """Return the standard deviation; NaN of a single value.

    Example:
        >>> spread_of([1.0, 2.0, 3.0])
        1.0
    """
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
