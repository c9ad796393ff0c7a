"""The results: a CSV file per study, to which each run adds a row as it ends; runs that are there are not repeated."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Key(NamedTuple):
    """One run."""

    cell: str
    workers: int
    lr: float
    seed: int
    steps: int


class Row(NamedTuple):
    """The outcome of a run."""

    key: Key
    values: tuple[float, ...]


class Results:
    """The rows of one study.

    Args:
        path: of the file.
        columns: names of the values.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self._columns = tuple(columns)
        self.rows: dict[Key, Row] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                head, *lines = list(csv.reader(file))
            if tuple(head) != (*Key._fields, *self._columns):
                raise ValueError(f"{path} has other columns than {self._columns}: move it away.")
            for cell, workers, lr, seed, steps, *values in lines:
                key = Key(cell, int(workers), float(lr), int(seed), int(steps))
                self.rows[key] = Row(key, tuple(map(float, values)))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append((*Key._fields, *self._columns))

    def add(self, key: Key, values: Sequence[float]) -> None:
        """Add a run."""
        self._append([*key, *(f"{value:.6g}" for value in values)])
        self.rows[key] = Row(key, tuple(values))

    def keep(self, keys: Sequence[Key]) -> None:
        """Drop all other runs, of other rates or lengths, and write the file in this order."""
        self.rows = {key: self.rows[key] for key in keys}
        incoming = self.path.with_suffix(".new")
        with incoming.open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow((*Key._fields, *self._columns))
            lines.writerows([*key, *(f"{value:.6g}" for value in row.values)] for key, row in self.rows.items())
        incoming.replace(self.path)

    def of(self, cell: str, workers: int, lr: float | None = None) -> list[tuple[float, ...]]:
        """Return the values of the runs of a cell, in the order of the seeds."""
        found = [
            row for key, row in self.rows.items() if (key.cell, key.workers) == (cell, workers) and lr in (None, key.lr)
        ]
        return [row.values for row in sorted(found, key=lambda row: row.key.seed)]

    def _append(self, values: Sequence[object]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(values)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Return mean ± standard deviation as text, and how many runs have diverged.

    Example:
        >>> spread([1.0, 2.0, 3.0]), spread([float("nan"), 1.0])
        ('2.0 ± 1.0', '1.0, 1 of 2 diverged')
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "diverged" if values else "–"
    deviation = f" ± {statistics.stdev(finite):.{digits}f}" if len(finite) > 1 else ""
    diverged = f", {len(values) - len(finite)} of {len(values)} diverged" if len(finite) < len(values) else ""
    return f"{statistics.mean(finite):.{digits}f}{deviation}{diverged}"


def paired(values: Sequence[float], base: Sequence[float], digits: int = 1) -> str:
    """Return mean ± standard error of the differences, seed by seed."""
    apart = [a - b for a, b in zip(values, base, strict=False)]
    if len(apart) < 2 or not all(map(math.isfinite, apart)):
        return "–"
    error = statistics.stdev(apart) / math.sqrt(len(apart))
    return f"{statistics.mean(apart):+.{digits}f} ± {error:.{digits}f}"
