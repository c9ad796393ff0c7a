"""The soak finds what it looks for, and a short one goes well."""

import os
import subprocess
import sys

import pytest

from soak.checks import compare, growth, lost_steps
from support.installation import ROOT


def noted(host, step, digest, since=(0, 3, (), 0)):
    return {"kind": "outer", "host": host, "process": 1, "step": step, "digest": digest, "since": since}


def test_workers_that_differ_after_an_outer_step_are_found():
    same = [noted("a", 8, "x"), noted("b", 8, "x")]
    differ = [noted("a", 16, "x"), noted("b", 16, "y")]
    elsewhere = [noted("a", 24, "x"), noted("b", 24, "y", since=(20, 2, (), 0))]  # not of the same workers
    alone = [noted("a", 32, "x")]
    count, unequal = compare([*same, *differ, *elsewhere, *alone])
    assert count == 2
    assert len(unequal) == 1
    assert "16" in unequal[0]


def test_a_process_that_grows_is_found():
    steady = [{"process": 1, "workers": 3, "memory": 100, "files": 10, "threads": 5} for _ in range(30)]
    grows = [{"process": 2, "workers": 3, "memory": 100 + 10 * n, "files": 10, "threads": 5} for n in range(30)]
    young = [{"process": 3, "workers": 3, "memory": 1000**n, "files": 10, "threads": 5} for n in range(5)]
    found = growth([*steady, *grows, *young])
    assert found["memory"] == pytest.approx(345 / 245)
    assert (found["files"], found["threads"]) == (1, 1)


def test_steps_that_a_survivor_has_lost_are_found():
    def change(before, step, own):
        return {"kind": "change", "before": before, "step": step, "own": own}

    newcomer, kept = change((0, 0), 24, 0), change((19, 3), 19, 3)
    assert lost_steps([newcomer, kept, change((19, 3), 24, 0)]) == (2, 0)  # the last one skips to the others' block
    assert lost_steps([change((19, 3), 16, 0)]) == (1, 3 + 3)
    assert lost_steps([change((19, 3), 20, 1)]) == (1, 2)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.workers
@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_short_soak(tmp_path, framework):
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT, ROOT / "torch", ROOT / "tf")))
    job = subprocess.run(
        [sys.executable, "-m", "soak", "--minutes", "2", "--frameworks", framework, "--out", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert (tmp_path / f"soak_{framework}.png").exists()
