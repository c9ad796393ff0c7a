"""Jobs that lose and gain workers, with the repair "elastic recovery" of the Horovod that is installed here."""

import re
import subprocess
import sys
import time

import pytest

from hvd_slowmo.installer.local import environments
from support.elastic import hvd_slowmo_run, set_hosts

pytest.importorskip("horovod.torch")
pytestmark = [pytest.mark.slow, pytest.mark.workers]

HOSTS = ["localhost", "127.0.0.1", "127.1"]

# The workers sum ones, and print a line whenever their number has changed.
TRAIN = """
import os, signal, sys, time
host = os.environ["HOROVOD_HOSTNAME"]
{before}
import horovod.torch as hvd, torch
from horovod.common.elastic import ObjectState
hvd.init()
state = ObjectState(hvd.broadcast_object, hvd.rank, step=0, size=0)


@hvd.elastic.run
def train(state):
    while state.step < 100000:
        total = hvd.allreduce(torch.ones(1000), op=hvd.Sum, name="step")
        state.step += 1
        if hvd.size() != state.size:
            state.size = hvd.size()
            print(f"{{time.time():.3f}} size {{state.size}} {{total[0].item():.0f}}", flush=True)
        {action}
        if {end}:
            break
        state.commit()


train(state)
print("done", hvd.size(), flush=True)
"""


def finish(job, limit=120):
    try:
        output, errors = job.communicate(timeout=limit)
    finally:
        job.kill()  # ends the workers too
    assert job.returncode == 0, output[-1000:] + errors[-4000:]
    return output, errors


def changes(output, size):
    return [float(moment) for moment in re.findall(rf"([\d.]+) size {size} {size}", output)]


@pytest.mark.thorough  # tests/comm/test_elastic.py has survivors in any case
def test_survivors_go_on_at_once(tmp_path):
    kill = 'if state.step == 200 and hvd.rank() == 2: print(f"{time.time():.3f} kill"); os.kill(os.getpid(), 9)'
    end = "hvd.size() == 2 and state.step > 300"
    output, _ = finish(hvd_slowmo_run(tmp_path, TRAIN.format(before="", action=kill, end=end), 3, HOSTS))
    (killed,) = map(float, re.findall(r"([\d.]+) kill", output))
    again = changes(output, 2)
    assert len(again) == 2
    assert max(again) - killed < 10  # 33 s without the repair
    assert output.count("done 2") == 2


@pytest.mark.thorough
def test_a_stopped_worker_is_ended_and_the_others_go_on(tmp_path):
    stop = "if state.step == 200 and hvd.rank() == 2: os.kill(os.getpid(), signal.SIGSTOP)"
    end = "hvd.size() == 2 and state.step > 300"
    limits = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "3", "HVD_SLOWMO_TIMEOUT": "4"}
    output, errors = finish(hvd_slowmo_run(tmp_path, TRAIN.format(before="", action=stop, end=end), 3, HOSTS, **limits))
    assert len(changes(output, 2)) == 2
    assert output.count("done 2") == 2  # without the repair they would wait for ever
    assert "has not come back with the others and is ended" in errors


def read_until(job, size):
    """Read the job's output until all of so many workers have said that they are so many; return it."""
    lines = []
    for line in job.stdout:
        lines.append(line)
        if len(changes("".join(lines), size)) == size:
            break
    return "".join(lines)


def grown(tmp_path, before, end, **variables):
    """Run a job of two workers that gets a third host, whose worker does `before` at its start."""
    script = TRAIN.format(before=f'if host == "127.1": {before}', action="time.sleep(0.01)", end=end)
    job = hvd_slowmo_run(tmp_path, script, 2, HOSTS[:2], **variables)
    first = read_until(job, 2)
    set_hosts(tmp_path, HOSTS)
    output, errors = finish(job)
    return first + output, errors


@pytest.mark.thorough
def test_the_others_wait_for_a_newcomer_that_starts_slowly(tmp_path):
    end = "hvd.size() == 3"
    output, errors = grown(tmp_path, "time.sleep(6)", end, HOROVOD_GLOO_TIMEOUT_SECONDS="3")
    assert output.count("done 3") == 3
    assert "terminate called" not in errors


@pytest.mark.thorough
def test_the_others_go_on_without_a_newcomer_that_fails_at_its_start(tmp_path):
    # The job ends some time after the newcomer's failure.
    before = 'open("failed", "w").close(); sys.exit(1)'
    end = 'hvd.allreduce(torch.tensor(float(os.path.exists("failed"))), op=hvd.Sum, name="end") == hvd.size() == 2'
    started = time.monotonic()
    output, errors = grown(tmp_path, before, end)
    assert output.count("done 2") == 2
    assert "terminate called" not in errors
    assert time.monotonic() - started < 90


@pytest.mark.thorough
def test_a_host_that_is_taken_away_can_come_back(tmp_path):
    end = 'hvd.size() == 3 and os.path.exists("back")'
    job = hvd_slowmo_run(tmp_path, TRAIN.format(before="", action="time.sleep(0.01)", end=end), 3, HOSTS)
    read_until(job, 3)
    set_hosts(tmp_path, HOSTS[:2])
    read_until(job, 2)
    # Horovod's launcher takes the end of the old worker for that of the new one, if the new one is there by then.
    next(line for line in job.stdout if "exit with status code" in line)
    (tmp_path / "back").touch()
    set_hosts(tmp_path, HOSTS)
    output, _ = finish(job)
    assert output.count("done 3") == 3


def workers(tmp_path, code, size, count, **variables):
    """Run `count` of `size` workers, and return their exit statuses and outputs."""
    with environments(size) as complete:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code],
                env={**env, "OMP_NUM_THREADS": "1", **variables},
                cwd=tmp_path,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for env in complete[:count]
        ]
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.mark.thorough
def test_a_worker_that_never_comes_is_an_error_of_init(tmp_path):
    code = """
import horovod.torch as hvd
try:
    hvd.init()
except ValueError as error:
    print("caught", error)
"""
    (status,), (output,) = workers(tmp_path, code, 2, 1, HOROVOD_GLOO_TIMEOUT_SECONDS="1")
    assert status == 0, output
    assert "caught Horovod initialization failed" in output
    assert "Wait timeout after 1 seconds" in output


def test_a_lost_worker_is_an_error_on_the_others_with_process_sets_too(tmp_path):
    code = """
import os
import horovod.torch as hvd, torch
pair = hvd.ProcessSet([0, 1])
hvd.init(process_sets=[pair])
if pair.included():
    hvd.allreduce(torch.ones(3), name="pair", process_set=pair)
hvd.allreduce(torch.ones(3), name="all")
if hvd.rank() == 2:
    os.kill(os.getpid(), 9)
try:
    hvd.allreduce(torch.ones(3), name="again")
except Exception as error:
    print("caught", type(error).__name__)
hvd.shutdown()
"""
    statuses, outputs = workers(tmp_path, code, 3, 3)
    assert statuses == [0, 0, -9], outputs
    assert all("caught HorovodInternalError" in output for output in outputs[:2])
