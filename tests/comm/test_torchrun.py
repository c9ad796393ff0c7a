"""Whole jobs under torchrun: the examples, nodes, a launcher without init, and a killed worker."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.workers]


def torchrun(*command, workers=2, options=(), folder=None):
    """Run a job to its end."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "torch"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers), *options, *map(str, command)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        cwd=folder,
        check=False,
    )


def script(folder, text):
    path = folder / "train.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_small_example_learns():
    job = torchrun(ROOT / "examples" / "minimal_torch.py")
    assert job.returncode == 0, job.stderr
    assert float(re.search(r"test accuracy (\d+\.\d) %", job.stdout)[1]) > 90


@pytest.mark.thorough
def test_the_digits_example_runs_unchanged(tmp_path):
    job = torchrun(ROOT / "examples" / "digits_torch.py", "--quick", "--out", tmp_path)
    assert job.returncode == 0, job.stderr
    assert float(re.search(r"slowmo +(\d+\.\d) +\d+\.\d\d +\d+\.\d\d$", job.stdout, re.MULTILINE)[1]) > 80


MODEL = """
import os, signal, torch
import hvd_slowmo.torch as slowmo
model = torch.nn.Linear(3, 2)
def train(steps, **settings):
    optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, tau=2, **settings)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((1, 3), float(slowmo.rank() + step))).square().sum().backward()
        optimizer.step()
"""


@pytest.mark.thorough
def test_without_init_every_rank_is_told_the_line(tmp_path):
    job = torchrun(script(tmp_path, MODEL + "train(2)"), options=["--tee", "3"])
    assert job.returncode != 0
    assert "one of 2 workers. Call hvd_slowmo.torch.init()" in job.stderr


@pytest.mark.thorough
def test_a_killed_worker_ends_the_job(tmp_path):
    text = (
        MODEL
        + """
slowmo.init()
train(3)
if slowmo.rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
train(4)
"""
    )
    job = torchrun(script(tmp_path, text))
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in job.stderr


@pytest.mark.thorough
def test_init_is_not_needed_after_the_scripts_own(tmp_path):
    text = (
        MODEL
        + """
torch.distributed.init_process_group("gloo")
train(4)
torch.distributed.destroy_process_group()
torch.save(model.weight, f"weight-{os.environ['RANK']}.pt")  # the ranks' lines mingle on one terminal
"""
    )
    job = torchrun(script(tmp_path, text), folder=tmp_path)
    assert job.returncode == 0, job.stderr
    first, second = (torch.load(tmp_path / f"weight-{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
