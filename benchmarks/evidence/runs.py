"""All runs of the evidence, on several processes; each result is in its file before the next one is waited for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from evidence import images, theorem, translation
from evidence.results import Key, Results
from evidence.studies import STUDIES, Cell, Plan, Translation, methods, translators

IMAGE_COLUMNS = ("accuracy", "loss", "drift")
TRANSLATION_COLUMNS = ("bleu", "loss")
THEOREM_COLUMNS = ("squared_norm",)

Task = tuple[Results, Key, Callable[..., Sequence[float]], tuple[object, ...]]


def run_tasks(tasks: Sequence[Task], processes: int, report: Callable[[str], None]) -> None:
    """Run what has no result yet, report each end, and drop the results of other plans."""
    missing = [task for task in tasks if task[1] not in task[0].rows]
    with ProcessPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(work, *given): (results, key) for results, key, work, given in missing}
        for number, future in enumerate(as_completed(futures), 1):
            results, key = futures[future]
            results.add(key, future.result())
            values = ", ".join(f"{value:.4g}" for value in results.rows[key].values)
            report(f"{results.path.stem} {number}/{len(missing)}: {key.cell}, {key.workers} workers: {values}")
    for results in {id(task[0]): task[0] for task in tasks}.values():
        results.keep([task[1] for task in tasks if task[0] is results])


def tune(folder: Path, plan: Plan, processes: int, report: Callable[[str], None]) -> dict[tuple[str, int], float]:
    """Return the best learning rate of each method and number of workers, by the validation images and other seeds."""
    results = Results(folder / "tuning.csv", IMAGE_COLUMNS)
    cells = list(methods(plan))
    tasks = [
        _image_task(results, cell, rate, seed, plan.steps, "validation")
        for seed in plan.tuning_seeds
        for cell in cells
        for rate in plan.rates
    ]
    run_tasks(tasks, processes, report)
    return {(cell.name, cell.workers): _best(results, cell, plan.rates) for cell in cells}


def _best(results: Results, cell: Cell, rates: Sequence[float]) -> float:
    """Return the rate with the highest mean of the first column; one that diverges is none."""

    def score(rate: float) -> float:
        mean = statistics.mean(values[0] for values in results.of(cell.name, cell.workers, rate))
        return mean if math.isfinite(mean) else -1.0

    return max(rates, key=score)


def study(
    name: str,
    folder: Path,
    plan: Plan,
    rates: dict[tuple[str, int], float],
    processes: int,
    report: Callable[[str], None],
) -> Results:
    """Run a study on images and return its results."""
    results = Results(folder / f"{name}.csv", IMAGE_COLUMNS)
    tasks = [
        _image_task(results, cell, rate_of(cell, plan, rates), seed, plan.steps, "test")
        for seed in range(plan.seeds)
        for cell in STUDIES[name](plan)
    ]
    run_tasks(tasks, processes, report)
    return results


def rate_of(cell: Cell, plan: Plan, rates: dict[tuple[str, int], float]) -> float:
    """Return a cell's learning rate: that of the nearest number of workers for which it was tuned."""
    nearest = min(plan.workers, key=lambda workers: abs(math.log(workers / cell.workers)))
    return rates[cell.tuned_as, nearest]


def _image_task(results: Results, cell: Cell, rate: float, seed: int, steps: int, held_out: str) -> Task:
    key = Key(cell.name, cell.workers, rate, seed, steps)
    return results, key, images.train, (cell.config, cell.workers, rate, seed, steps, cell.shards, held_out)


def translate(
    folder: Path, plan: Translation, processes: int, report: Callable[[str], None]
) -> tuple[Results, dict[str, float]]:
    """Tune and run the translation; return its results, and the learning rate of each method."""
    cells = list(translators(plan))
    tuning = Results(folder / "translation_tuning.csv", TRANSLATION_COLUMNS)
    tasks = [
        _translation_task(tuning, cell, rate, seed, plan.steps, "validation")
        for seed in plan.tuning_seeds
        for cell in cells
        for rate in plan.rates
    ]
    run_tasks(tasks, processes, report)
    rates = {cell.name: _best(tuning, cell, plan.rates) for cell in cells}
    results = Results(folder / "translation.csv", TRANSLATION_COLUMNS)
    tasks = [
        _translation_task(results, cell, rates[cell.name], seed, plan.steps, "test")
        for seed in range(plan.seeds)
        for cell in cells
    ]
    run_tasks(tasks, processes, report)
    return results, rates


def _translation_task(results: Results, cell: Cell, rate: float, seed: int, steps: int, held_out: str) -> Task:
    key = Key(cell.name, cell.workers, rate, seed, steps)
    return results, key, translation.train, (cell.config, cell.workers, rate, seed, steps, held_out)


def prove(folder: Path, longest: int, seeds: int, processes: int, report: Callable[[str], None]) -> Results:
    """Run the theorem's problem: 8 workers over the steps, and half of the most steps over the workers."""
    results = Results(folder / "theorem.csv", THEOREM_COLUMNS)
    lengths = [longest >> shift for shift in range(4, -1, -1)]
    points = [(8, steps) for steps in lengths] + [(workers, longest // 2) for workers in (1, 2, 4, 16, 32)]
    tasks: list[Task] = [
        (results, Key(f"β = {beta:g}", workers, 0.0, seed, steps), squared_norm, (beta, workers, steps, seed))
        for seed in range(seeds)
        for beta in (0.0, 0.6)
        for workers, steps in points
    ]
    run_tasks(tasks, processes, report)
    return results


def squared_norm(beta: float, workers: int, steps: int, seed: int) -> tuple[float]:
    """Return the theorem's mean, as a row."""
    return (theorem.run(beta, workers, steps, seed),)
