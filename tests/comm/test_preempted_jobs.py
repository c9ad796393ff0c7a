"""Whole jobs that are preempted or lose a worker, under horovodrun and torchrun: the same command line resumes them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HOROVODRUN = Path(sys.executable).with_name("horovodrun")
RUN = [sys.executable, "-m", "hvd_slowmo.cli.main", "run"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ELASTIC = ["--nnodes", "1:2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-conf=last_call_timeout=1"]
pytestmark = [pytest.mark.slow, pytest.mark.workers]

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import torch
import hvd_slowmo.torch as slowmo

folder, stop, every, pause = Path(sys.argv[1]), *map(int, sys.argv[2:5])
slowmo.init()
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5), model, tau=4)
checkpoints = slowmo.Checkpoints(folder / "checkpoints", every=every)
slowmo.on_preemption(save=checkpoints)
start = checkpoints.resume(optimizer)
lost = folder / "lost"
status = 0
try:
    for step in range(start, stop):
        optimizer.zero_grad()
        model(torch.full((1, 3), float(slowmo.rank() + step % 3))).square().sum().backward()
        optimizer.step()
        checkpoints.step()
        if step == 5:
            (folder / f"pid-{slowmo.rank()}").write_text(str(os.getpid()))
        if "--kill" in sys.argv and slowmo.rank() == 1 and step == 13 and not lost.exists():
            lost.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if pause and step > 5 and start == 0:
            time.sleep(0.05)
    checkpoints.finish()
except SystemExit as ended:
    status = ended.code
    raise
finally:
    result = {"start": start, "steps": optimizer.steps, "status": status, "weight": model.weight.tolist()}
    (folder / f"result-{slowmo.rank()}.json").write_text(json.dumps(result))
"""


def environment():
    path = os.pathsep.join([str(ROOT), str(ROOT / "torch"), os.environ.get("PYTHONPATH", "")])
    # See docs/checkpoints.md: without the second one Gloo can't connect again after a restart.
    return {**os.environ, "PYTHONPATH": path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}


def launched(folder, launcher, *arguments):
    """Start a job in a session of its own."""
    script = folder / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    commands = {
        "hvd-slowmo run": [*RUN, "-np", "2", sys.executable],
        "horovodrun": [HOROVODRUN, "-np", "2", sys.executable],
        "torchrun": TORCHRUN,
        "torchrun, again": [*TORCHRUN, "--standalone", "--max-restarts=1"],
        "torchrun, elastic": [*TORCHRUN, "--max-restarts=1", *ELASTIC],
    }
    command = [str(part) for part in (*commands[launcher], script, folder, *arguments)]
    with (folder / "errors.txt").open("w") as sink:  # no pipe: workers that outlive a launcher would keep it open
        return subprocess.Popen(command, env=environment(), stdout=sink, stderr=sink, start_new_session=True)


def ended(job, folder):
    """Wait for a job's end; return its exit status and its output."""
    try:
        job.wait(200)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        pytest.fail(f"the job hangs\n{(folder / 'errors.txt').read_text()[-3000:]}", pytrace=False)
    return job.returncode, (folder / "errors.txt").read_text()


def results(folder):
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(2)]


def pid_of(folder, rank):
    path, deadline = folder / f"pid-{rank}", time.monotonic() + 200
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, "the job has not begun"
        time.sleep(0.1)
    return int(path.read_text())


@pytest.mark.parametrize(
    ("launcher", "receiver"),
    [
        ("horovodrun", "worker"),
        pytest.param("hvd-slowmo run", "launcher", marks=pytest.mark.thorough),
        pytest.param("horovodrun", "launcher", marks=pytest.mark.thorough),
        pytest.param("torchrun", "launcher", marks=pytest.mark.thorough),
        pytest.param("torchrun", "worker", marks=pytest.mark.thorough),
    ],
)
def test_a_plain_kill_saves_and_ends_all_workers(launcher, receiver, tmp_path):
    job = launched(tmp_path, launcher, 10000, 100000, 1)
    worker = pid_of(tmp_path, 1)
    os.kill(worker if receiver == "worker" else job.pid, signal.SIGTERM)
    status, errors = ended(job, tmp_path)
    assert status == 75 if launcher == "hvd-slowmo run" else status != 0
    first, second = results(tmp_path)
    assert first["status"] == second["status"] == 75, errors[-3000:]
    assert first["steps"] == second["steps"]
    assert first["steps"] % 4 == 0  # an outer step
    stop = first["steps"] + 4
    status, errors = ended(launched(tmp_path, launcher, stop, 100000, 0), tmp_path)
    assert status == 0, errors[-3000:]
    for rank, result in enumerate(results(tmp_path)):
        assert result["start"] == first["steps"], rank
        assert result["steps"] == stop, rank


@pytest.mark.thorough
@pytest.mark.parametrize("launcher", ["torchrun, again", "torchrun, elastic"])
def test_torchrun_resumes_after_a_killed_worker_as_if_none_had_been(launcher, tmp_path):
    runs = {}
    for name, options in (("whole", ()), ("killed", ("--kill",))):
        folder = tmp_path / name
        folder.mkdir()
        status, errors = ended(launched(folder, launcher, 24, 4, 0, *options), folder)
        assert status == 0, errors[-3000:]
        runs[name] = results(folder)
    assert (tmp_path / "killed" / "lost").exists()
    for whole, killed in zip(runs["whole"], runs["killed"], strict=True):
        assert whole["start"] == 0
        assert killed["start"] in (4, 8)  # step 12's checkpoint can't be whole at step 14
        assert torch.equal(torch.tensor(killed["weight"]), torch.tensor(whole["weight"]))


@pytest.mark.thorough
def test_the_same_command_resumes_under_horovodrun_after_a_killed_worker(tmp_path):
    status, _ = ended(launched(tmp_path, "horovodrun", 24, 4, 0, "--kill"), tmp_path)
    assert status != 0
    status, errors = ended(launched(tmp_path, "horovodrun", 24, 4, 0, "--kill"), tmp_path)
    assert status == 0, errors[-3000:]
    for result in results(tmp_path):
        assert result["start"] in (4, 8)
        assert result["steps"] == 24
