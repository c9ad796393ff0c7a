"""The soak finds what it looks for, and a short one goes well."""

import os
import subprocess
import sys

import pytest

from soak.checks import compare, growth, longest_pause, lost_steps, seconds_of_block
from soak.faults import FEWEST, FREE, HOSTS, MOST, SLOW, Faults, slow_periods
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


def joins(process, count=90, workers=lambda n: 3, memory=lambda n: 100, files=lambda n: 10):
    return [
        {"kind": "join", "process": process, "since": (0, workers(n), (), n), "memory": memory(n), "files": files(n)}
        | {"threads": 5}
        for n in range(count)
    ]


def test_a_process_that_grows_is_found_and_not_one_that_has_more_workers():
    more = joins(1, workers=lambda n: 3 + (n > 40), files=lambda n: 10 + 6 * (n > 40))
    assert growth(more) == {"memory": 1, "files": 0, "threads": 0}
    young = joins(2, count=12, memory=lambda n: 1000**n)
    assert growth(young) == {}
    grows = joins(3, memory=lambda n: 100 + n, files=lambda n: 10 + n // 10)
    assert growth([*more, *grows]) == {"memory": pytest.approx(174.5 / 144.5), "files": 3, "threads": 0}


def changed(step, own, before):
    return {"kind": "change", "host": "a", "step": step, "own": own, "before": before}


def test_steps_that_a_survivor_loses_are_found():
    newcomer = changed(35, 0, (0, 0))
    kept = [changed(35, 3, (35, 3)), changed(36, 4, (35, 3)), changed(40, 0, (39, 7))]
    assert lost_steps([newcomer, *kept]) == (3, [])
    survived, (case,) = lost_steps([*kept, changed(32, 0, (35, 3))])  # steps, and own ones in the block
    assert (survived, case) == (4, "6 on a, at (step, own in the block) (35, 3), then (32, 0)")
    survived, (case,) = lost_steps([changed(35, 1, (35, 3))])
    assert (survived, case.split()[0]) == (1, "2")


def test_time_without_an_outer_step_is_found():
    outer = [{**noted("a", 8 * n, "x"), "time": time} for n, time in enumerate((0, 1, 31, 32))]
    assert longest_pause(outer) == 30


def test_blocks_on_a_slow_link_are_told_apart():
    done = [(10, SLOW), (12, "killed a"), (20, FREE), (30, SLOW)]
    assert slow_periods(done) == [(10, 20), (30, float("inf"))]
    outer = [{**noted("a", 8 * n, "x"), "time": time} for n, time in enumerate((7, 8, 9, 11, 14, 17, 21, 22))]
    assert seconds_of_block(outer, slow_periods(done)) == (3, 1)


class PretendedJob:
    def __init__(self):
        self.hosts = list(HOSTS[:3])

    def set_hosts(self, hosts):
        self.hosts = list(hosts)

    def training(self):
        return dict.fromkeys(self.hosts, 1)

    def rested(self, host):
        return True

    def joins(self, host):
        return True

    def order(self, what, host):
        pass


def test_all_faults_come_and_the_job_keeps_its_workers(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("os.kill", lambda process, number: None)
    monkeypatch.setattr("soak.faults.STOPPED_LONG_S", 0)  # nobody ends the worker that is stopped
    job = PretendedJob()
    faults, found = Faults(job, seed=0), set()
    for _ in range(40):
        line = faults.next()
        assert FEWEST <= len(job.hosts) <= MOST
        found.add(" ".join(word for word in line.split() if word.strip(",") not in HOSTS))
    orders = {"nan on", "overflow on", "full on", "let hang", "stopped for a moment"}
    assert found >= orders | {"killed", "killed in a join", "took away", "took away in a join", "added", "added slowly"}


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
