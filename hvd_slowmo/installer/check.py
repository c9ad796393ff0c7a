"""Checks on this machine, with a time limit: an allreduce per transport, Horovod's stall check, its signed services."""

from __future__ import annotations

import http
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hvd_slowmo.installer import local, process

TIME_LIMIT = 180.0  # on a busy machine the import of TensorFlow alone takes a minute
STALL_TIME_LIMIT = 15.0
_STARTUP_ALLOWANCE = 120.0
_WORKER = Path(__file__).with_name("worker.py")
_MARK = "hvd-slowmo-check "
_TAIL = 12


@dataclass(frozen=True)
class Result:
    """Result of a check.

    Attributes:
        error: error message followed by the last output of the workers, or None if the check passed.
        seconds: duration.
        facts: "gloo", "mpi" and "nccl", each True if the transport was built with it, as reported by worker 0.
    """

    error: str | None
    seconds: float
    facts: Mapping[str, bool] = field(default_factory=dict)


def allreduce(framework: str, time_limit: float = TIME_LIMIT) -> Result:
    """Sum a tensor over two workers.

    Args:
        framework: "torch" or "tensorflow", over Horovod, or "torch.distributed".
        time_limit: in seconds, with the startup of the workers.

    Returns:
        The result. Failures are reported in `Result.error`, not raised.
    """
    return _run(framework, "allreduce", {}, time_limit, wait_for=(0, 1))


def stall(framework: str, time_limit: float = STALL_TIME_LIMIT) -> Result:
    """Check that Horovod raises an error in a worker that waits for a tensor which the other worker never sends.

    Args:
        framework: "torch" or "tensorflow".
        time_limit: in seconds, without the startup of the workers, which has a separate allowance.

    Returns:
        The result. Failures are reported in `Result.error`, not raised.
    """
    env = {
        "HOROVOD_STALL_CHECK_TIME_SECONDS": "1",
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "3",
        "HOROVOD_STALL_CHECK_DISABLE": "0",
    }
    return _run(framework, "stall", env, time_limit + _STARTUP_ALLOWANCE, wait_for=(0,))


def strangers() -> Result:
    """Check that the rendezvous server refuses requests that are not signed with the job's secret.

    Returns:
        The result. Failures are reported in `Result.error`, not raised.
    """
    started = time.monotonic()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    served = []
    try:
        with local.environments(1) as (environment,):
            address = (environment[f"HOROVOD_GLOO_RENDEZVOUS_{part}"] for part in ("ADDR", "PORT"))
            url = f"http://{':'.join(address)}/hvd_slowmo.check/0"
            for method, data in (("PUT", b"0"), ("GET", None)):
                try:
                    with opener.open(urllib.request.Request(url, data, method=method), timeout=TIME_LIMIT):
                        served.append(method)
                except urllib.error.HTTPError as error:
                    if error.code != http.HTTPStatus.FORBIDDEN:
                        served.append(method)
    except (ImportError, OSError) as error:
        return Result(str(error), time.monotonic() - started)
    text = f"the rendezvous server serves unsigned requests: {', '.join(served)}" if served else None
    return Result(text, time.monotonic() - started)


def _run(framework: str, task: str, extra: Mapping[str, str], time_limit: float, wait_for: tuple[int, ...]) -> Result:
    started = time.monotonic()
    # Hide the GPUs: two workers may not fit on one, and the check concerns Horovod only.
    settings = {
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
    if framework == "torch.distributed":
        ranks = [{**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
        complete = [{**environment, **settings, **extra} for environment in ranks]
        return _watch(complete, framework, task, started, time_limit, wait_for)
    try:
        with local.environments(2) as environments:
            complete = [{**environment, **settings, **extra} for environment in environments]
            return _watch(complete, framework, task, started, time_limit, wait_for)
    except ImportError as error:
        return Result(f"Horovod cannot be imported: {error}", time.monotonic() - started)


def _watch(
    environments: list[dict[str, str]],
    framework: str,
    task: str,
    started: float,
    time_limit: float,
    wait_for: tuple[int, ...],
) -> Result:
    # runpy in an empty directory keeps the installer's modules and the user's files from becoming importable.
    code = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(_WORKER), framework, task]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"worker{rank}.log") for rank in range(len(environments))]
        workers: list[subprocess.Popen[str]] = []
        try:
            for env, log in zip(environments, logs, strict=True):
                with log.open("w", encoding="utf-8") as sink:
                    workers.append(
                        subprocess.Popen(
                            command,
                            env=env,
                            cwd=folder,
                            text=True,
                            stdin=subprocess.DEVNULL,
                            stdout=sink,
                            stderr=sink,
                            start_new_session=True,
                        )
                    )
            error = _wait(workers, started + time_limit, time_limit, wait_for)
        finally:
            for worker in workers:
                process.stop(worker)
        texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    seconds = time.monotonic() - started
    answers = [_answer(text) for text in texts]
    if error is None and not all(answers[rank].get("ok") for rank in wait_for):
        error = "the result is wrong" if task == "allreduce" else "no error was raised"
    if error is not None:
        spoken = [f"[worker {rank}] {line}" for rank, text in enumerate(texts) for line in text.splitlines()[-_TAIL:]]
        error = "\n".join([error, *spoken])
    return Result(error, seconds, answers[0])


def _wait(
    workers: list[subprocess.Popen[str]], deadline: float, time_limit: float, wait_for: tuple[int, ...]
) -> str | None:
    while True:
        states = [worker.poll() for worker in workers]
        for rank, state in enumerate(states):
            if state not in (None, 0):
                return f"worker {rank} ended with exit status {state}"
        if all(states[rank] == 0 for rank in wait_for):
            return None
        if time.monotonic() > deadline:
            return f"no result within {time_limit:g} s"
        time.sleep(0.05)


def _answer(text: str) -> dict[str, bool]:
    for line in text.splitlines():
        if line.startswith(_MARK):
            return dict(json.loads(line.removeprefix(_MARK)))
    return {}
