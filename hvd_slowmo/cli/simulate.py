"""The subcommand `simulate`."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hvd_slowmo.cli.arguments import importing_from_here, named, refusals
from hvd_slowmo.cli.console import Console
from hvd_slowmo.cli.sweep import Results, Row, Run, Score, Setting, ranked, runs_of
from hvd_slowmo.cli.sweep_figure import draw, figure_class
from hvd_slowmo.cli.table import table
from hvd_slowmo.errors import CommandError, spell_error

if TYPE_CHECKING:
    from hvd_slowmo.torch import SimulationTask

_BAR = 24
_SHOWN = 5  # settings of a table, from the best
_SECONDS_BETWEEN_STATES = 0.2


def add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `simulate` to the command line."""
    parser = commands.add_parser(
        "simulate",
        help="train a task with many workers in this process, over several settings, and choose among them",
        description="Trains a SimulationTask with each number of workers, tau, beta and seed, without a network. Each "
        "run that ends adds a row to OUT.csv; the same command goes on after an interruption. At the end it draws "
        "OUT.png and prints the settings that it would choose, with their differences from the next ones.",
    )
    parser.add_argument("task", metavar="MODULE:TASK", help="a SimulationTask, or a function that returns one")
    parser.add_argument("--workers", type=int, nargs="+", required=True, metavar="N", help="numbers of workers")
    parser.add_argument("--tau", type=int, nargs="+", required=True, metavar="N", help="inner steps per outer step")
    parser.add_argument("--beta", type=float, nargs="+", default=[0.5], metavar="X", help="slow momentum (0.5)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each setting (3)")
    parser.add_argument("--steps", type=int, metavar="N", help="inner steps of a run, in place of the task's")
    parser.add_argument(
        "--out", type=Path, default=Path("simulation"), metavar="OUT", help="files without their endings (simulation)"
    )
    parser.set_defaults(run=_simulate)


def _simulate(arguments: argparse.Namespace) -> int:
    for name in ("seeds", "steps"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            raise CommandError(f"--{name} must be a positive integer. Received: {number}")
    figure_class()  # before hours of training
    task = _task(arguments.task)
    task = task if arguments.steps is None else replace(task, steps=arguments.steps)
    settings = list(dict.fromkeys(Setting(tau, beta) for tau in arguments.tau for beta in arguments.beta))
    runs = runs_of(list(dict.fromkeys(arguments.workers)), settings, range(arguments.seeds))
    results = Results(arguments.out.with_name(arguments.out.name + ".csv"), arguments.task, task.steps)
    _train_all(task, runs, results)
    rows = [results.rows[run] for run in runs]
    metric = getattr(task.metric, "__name__", "<lambda>").replace("<lambda>", "metric")
    figure = arguments.out.with_name(arguments.out.name + ".png")
    draw(rows, metric, figure)
    for workers in dict.fromkeys(run.workers for run in runs):
        print(_choice([row for row in rows if row.workers == workers], metric), end="\n\n")
    print(f"Written: {results.path}, {figure}")
    return 0


def _task(text: str) -> SimulationTask:
    """Return the task with this name, or the one that the function of that name returns."""
    from hvd_slowmo.torch import SimulationTask

    with importing_from_here():
        found = named(text)
        if callable(found):
            try:
                found = found()
            except Exception as error:  # of the user's code: it may raise anything
                raise CommandError(f"{text} has raised {spell_error(error)}") from error
    if not isinstance(found, SimulationTask):
        raise CommandError(f"{text} must be a SimulationTask, or return one. Received: {type(found).__name__}")
    return found


def _train_all(task: SimulationTask, runs: Sequence[Run], results: Results) -> None:
    """Train all runs without results."""
    from hvd_slowmo_torch.simulator.task import simulation_of, train

    with refusals():
        configs = {run.setting: task.config(**run.setting._asdict()) for run in runs}
    left = [run for run in runs if run not in results.rows]
    with Console(verbose=False) as console:
        if len(left) < len(runs):
            console.say(f"{len(runs) - len(left)} of {len(runs)} runs are in {results.path} already.")
        progress = _Progress(console, left, task.steps)
        for number, run in enumerate(left):
            with refusals():
                simulation = simulation_of(task, run.workers, configs[run.setting], run.seed)
            results.add(run, train(simulation, task, run.seed, partial(progress.show, number)))


class _Progress:
    """The progress bar of a sweep. A run's share is its workers' share: their steps take most of the time."""

    def __init__(self, console: Console, runs: Sequence[Run], steps: int) -> None:
        self._console, self._runs, self._steps = console, runs, steps
        self._total = sum(run.workers for run in runs)
        self._started = self._shown = time.monotonic()

    def show(self, number: int, step: int) -> None:
        """Show the state after a step of a run, if the last state is old enough."""
        now = time.monotonic()
        if now < self._shown + _SECONDS_BETWEEN_STATES:
            return
        self._shown = now
        run = self._runs[number]
        done = sum(run.workers for run in self._runs[:number]) + run.workers * step / self._steps
        share, seconds = done / self._total, now - self._started
        bar = "#" * round(_BAR * share)
        what = f"[{bar:-<{_BAR}}] run {number + 1} of {len(self._runs)} ({run.workers} workers)"
        minutes, rest = divmod(round(seconds * (1 / share - 1)), 60)
        self._console.progress(what, int(100 * share), seconds, f"about {minutes} min {rest:02d} s left")


def _choice(rows: Sequence[Row], metric: str) -> str:
    """Return the settings that the sweep would choose for a number of workers, and the next ones, as text."""
    metrics: dict[Setting, list[float]] = {}
    for row in rows:
        metrics.setdefault(row.run.setting, []).append(row.metric)
    best, *others = ranked(metrics)
    seeds = len(metrics[best.setting])
    if best.diverged:
        return f"{rows[0].workers} workers: every setting has diverged with some seed. Try a lower learning rate."
    lines = [f"{rows[0].workers} workers: tau={best.setting.tau}, beta={best.setting.beta:g}"]
    head = ("tau", "beta", f"{metric} (± standard deviation)", "behind the best (± standard error)")
    lines.append(table(head, [_spell(score, score is best) for score in (best, *others[: _SHOWN - 1])]))
    if seeds == 1:
        lines.append("One seed tells nothing about the spread: use --seeds 3 or more.")
    elif close := [score.setting for score in others if not score.clearly_behind]:
        others_named = "; ".join(f"tau={setting.tau}, beta={setting.beta:g}" for setting in close)
        lines.append(f"Within two standard errors of the best, which {seeds} seeds can't tell apart: {others_named}.")
    elif others:
        lines.append(f"All others are more than two standard errors behind, over {seeds} seeds.")
    return "\n".join(lines)


def _spell(score: Score, is_best: bool) -> tuple[str, ...]:
    setting = str(score.setting.tau), f"{score.setting.beta:g}"
    if score.diverged:
        return (*setting, f"diverged in {score.diverged} run{'s' * (score.diverged > 1)}", "")
    behind = "" if is_best else _with_spread(score.behind, score.error)
    return (*setting, _with_spread(score.mean, score.spread), behind)


def _with_spread(value: float, spread: float) -> str:
    return f"{value:.4g}" if math.isnan(spread) else f"{value:.4g} ± {spread:.2g}"
