"""`hvd-slowmo simulate`."""

from __future__ import annotations

import builtins
import csv
import math
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from hvd_slowmo.cli.main import main
from hvd_slowmo.cli.sweep import Setting, ranked

MODULE = """
import torch
from torch import nn
from hvd_slowmo.torch import SimulationTask

made = []  # the models of the runs, of which the test may stop one
stop_at = [None]

def model():
    if len(made) == stop_at[0]:
        raise KeyboardInterrupt
    made.append(1)
    return nn.Linear(3, 1)

def batches(workers, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(workers, 8, 3, generator=generator)
        yield x, x.sum(dim=2, keepdim=True) + torch.arange(workers).view(-1, 1, 1)

def closeness(output, y):
    return -(output - y).square().mean()

def task(rate=0.05, batches=batches):
    x = torch.eye(3)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=rate)
    return SimulationTask(model, sgd, nn.functional.mse_loss, batches, (x, torch.ones(3, 1)), closeness, steps=12)

short = task(batches=lambda workers, seed: iter([]))
wild = task(rate=1e30)
number = 3

def broken():
    return 1 / 0
"""

SWEEP = ["--workers", "2", "3", "--tau", "2", "4", "--beta", "0", ".5", "--seeds", "2"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "simulated_task.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "simulated_task", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return __import__("simulated_task")


def run(capsys: pytest.CaptureFixture[str], *arguments: str, task: str = "task", status: int = 0) -> str:
    assert main(["simulate", f"simulated_task:{task}", *arguments]) == status
    out, err = capsys.readouterr()
    return out if status == 0 else err


def rows(path: Path = Path("simulation.csv")) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_sweep_trains_every_setting_and_writes_a_table_and_a_figure(
    module: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, *SWEEP)
    found = {(row["workers"], row["tau"], row["beta"], row["seed"]) for row in rows()}
    assert found == {(m, tau, beta, seed) for m in "23" for tau in "24" for beta in ("0.0", "0.5") for seed in "01"}
    assert Path("simulation.png").read_bytes().startswith(b"\x89PNG")
    assert "Written: simulation.csv, simulation.png" in out
    for m in (2, 3):
        chosen = re.search(rf"^{m} workers: tau=(\d), beta=([\d.]+)$", out, re.MULTILINE)
        assert chosen is not None, out
        means = {(row["tau"], f"{float(row['beta']):g}"): 0.0 for row in rows() if row["workers"] == str(m)}
        for row in rows():
            if row["workers"] == str(m):
                means[row["tau"], f"{float(row['beta']):g}"] += float(row["metric"]) / 2
        assert max(means, key=lambda key: means[key]) == chosen.groups()


def test_a_row_is_the_simulation_of_its_settings(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from hvd_slowmo.torch import Simulation, SlowMoConfig

    torch.manual_seed(4321)
    run(capsys, "--workers", "3", "--tau", "4", "--beta", ".6", "--seeds", "2", "--steps", "7")
    row = rows()[1]
    assert (row["seed"], row["steps"]) == ("1", "7")
    task = module.task()
    simulation = Simulation(task.model, task.inner, task.loss, 3, SlowMoConfig(tau=4, beta=0.6), seed=1)
    drifts, losses, batches = [], [], module.batches(3, 1)
    for _ in range(7):
        losses.append(float(simulation.step(*next(batches)).mean()))
        drifts.append(simulation.drift() ** 2)
    assert float(row["metric"]) == pytest.approx(simulation.evaluate(*task.test, module.closeness))
    assert float(row["loss"]) == pytest.approx(sum(losses[-4:]) / 4)
    assert float(row["drift"]) == pytest.approx(math.sqrt(sum(drifts[-4:]) / 4))
    assert torch.initial_seed() == 4321  # the process's random numbers are left alone


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_where_it_ended(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module.stop_at[0] = 5
    assert "interrupted" in run(capsys, *SWEEP, status=128 + signal.SIGINT)
    before = Path("simulation.csv").read_text()
    assert len(rows()) == 5
    Path("simulation.csv").write_text(before + "simulated_task:task,12,2,4")  # a row that was being written
    module.stop_at[0] = None
    out = run(capsys, *SWEEP)
    assert "5 of 16 runs are in simulation.csv already." in out
    assert len(module.made) == 16
    assert len(rows()) == 16
    assert Path("simulation.csv").read_text().startswith(before)
    run(capsys, *SWEEP)
    assert len(module.made) == 16

    run(capsys, *SWEEP, "--out", "whole")
    without = [{k: v for k, v in row.items() if k != "seconds"} for row in rows()]
    assert without == [{k: v for k, v in row.items() if k != "seconds"} for row in rows(Path("whole.csv"))]


@pytest.mark.slow
def test_a_sweep_can_grow(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--workers", "2", "--tau", "2", "--seeds", "1"]
    assert "One seed tells nothing about the spread" in run(capsys, *few)
    out = run(capsys, *few[:3], "2", "3", *few[4:])
    assert len(rows()) == 2
    assert "\n3    0.5" in out


@pytest.mark.slow
def test_results_of_another_sweep_are_not_taken_for_this_ones(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--workers", "2", "--tau", "2", "--seeds", "1"]
    run(capsys, *few)
    assert "task with 12 steps, and this sweep is of" in run(capsys, *few, "--steps", "5", status=1)
    Path("simulation.csv").write_text(Path("simulation.csv").read_text().replace(",0.5,", ",half,"))
    assert "simulation.csv, line 2: could not convert string to float: 'half'" in run(capsys, *few, status=1)
    Path("simulation.csv").write_text("a,b\n1,2\n")
    assert "not a table of a sweep" in run(capsys, *few, status=1)


@pytest.mark.slow
def test_a_run_that_diverges_is_recorded_and_never_chosen(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    # With tau=99 the workers meet for the first time in the evaluation.
    out = run(capsys, "--workers", "2", "--tau", "2", "99", "--seeds", "2", task="wild")
    assert {row["metric"] for row in rows()} == {"nan"}
    assert "2 workers: every setting has diverged with some seed" in out


def test_settings_are_ranked_by_their_means_with_paired_differences() -> None:
    good, close, bad, gone = Setting(4, 0.5), Setting(8, 0.5), Setting(16, 0.5), Setting(4, 0.9)
    metrics = {gone: [9.0, 9.0, math.nan], bad: [1.0, 3.0, 2.0], good: [4.0, 6.0, 5.0], close: [4.5, 5.0, 5.2]}
    best, second, third, last = ranked(metrics)
    assert [score.setting for score in (best, second, third, last)] == [good, close, bad, gone]
    assert (best.mean, best.spread, best.behind) == (5.0, 1.0, 0.0)
    assert second.behind == pytest.approx(0.1)
    assert second.error == pytest.approx(math.sqrt((0.6**2 + 0.9**2 + 0.3**2) / 2 / 3))  # around the mean 0.1
    assert (third.behind, third.error) == (3.0, 0.0)  # the seeds move both alike
    assert [score.clearly_behind for score in (second, third, last)] == [False, True, True]
    assert last.diverged == 1


def test_wrong_arguments_are_one_line(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--workers", "2", "--tau", "2"]
    assert "must be a SimulationTask, or return one. Received: int" in run(capsys, *few, task="number", status=1)
    assert "has raised ZeroDivisionError" in run(capsys, *few, task="broken", status=1)
    assert "has no nothing" in run(capsys, *few, task="nothing", status=1)
    assert "batches end after 0 of 12 steps" in run(capsys, *few, task="short", status=1)
    assert "`tau` must be a positive integer" in run(capsys, "--workers", "2", "--tau", "0", status=1)
    assert "`workers` must be a positive integer" in run(capsys, "--workers", "0", "--tau", "2", status=1)
    assert "--seeds must be a positive integer. Received: 0" in run(capsys, *few, "--seeds", "0", status=1)


def test_without_matplotlib_nothing_is_trained(
    module: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    original = builtins.__import__

    def absent(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert "pip install matplotlib" in run(capsys, *SWEEP, status=1)
    assert not module.made


def test_a_terminal_shows_a_bar_with_the_time_left(
    module: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("hvd_slowmo.cli.simulate._SECONDS_BETWEEN_STATES", 0.0)
    out = run(capsys, "--workers", "2", "--tau", "2", "--seeds", "2")
    states = [state for state in out.split("\r") if "left" in state]
    assert len(states) == 2 * 12
    assert re.search(r"\[#{6}-{18}\] run 1 of 2 \(2 workers\):  25 %, 0 min 00 s, about 0 min \d\d s left", states[5])
    assert "[########################] run 2 of 2" in states[-1]
