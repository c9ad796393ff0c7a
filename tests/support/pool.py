"""Real workers that stay alive and run one job after the other, so that one launch serves many tests.

A job is a function "support.module:name", called on every worker with the same arguments. A job that takes
too long fails with the report of Horovod's stall check, or of torch.distributed's timeout, and the next one gets new
workers. Between two jobs the processes are stopped: Horovod's background threads would take a third of a core for four
idle workers.
"""

from __future__ import annotations

import os
import pickle
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from hvd_slowmo.installer.local import environments

TESTS = Path(__file__).resolve().parents[1]
STALL_WARNING_S, STALL_SHUTDOWN_S = 5, 90  # a trace can take half a minute on a busy machine
ENDS = ("HorovodInternalError", "DistNetworkError")
"""Errors after which the workers can exchange nothing more."""

DISTRIBUTED = "torch.distributed"
"""The transport that is not Horovod's."""
START_LIMIT_S = 120
JOB_LIMIT_S = (
    240  # a hang is found by the stall check long before; a job of many traces takes minutes on a busy machine
)


class Failed(Exception):
    """Error that a job raised on one worker: type name and text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind = kind
        self.text = text

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


class Pool:
    """`size` workers; call `run`.

    transport: the module through which each worker reaches the others: one for all, or one per rank.
    """

    def __init__(self, size: int, transport: str | Sequence[str] = "horovod.torch", **variables: str) -> None:
        self.size = size
        self._transports = [transport] * size if isinstance(transport, str) else transport
        self._variables = variables
        self._workers: list[subprocess.Popen[bytes]] = []
        self._stack = ExitStack()

    def run(self, job: str, *, limit: float = JOB_LIMIT_S, **arguments: Any) -> list[Any]:
        """Run a job; return its results by rank, or raise the first failure."""
        results = self.outcomes(job, limit=limit, **arguments)
        for rank, result in enumerate(results):
            if isinstance(result, Failed):
                tails = self._tails()
                if any(isinstance(other, Failed) and other.kind in ENDS for other in results):
                    self.close()
                raise AssertionError(f"rank {rank} of {self.size}: {result}\n{tails}")
        return results

    def outcomes(self, job: str, *, limit: float = JOB_LIMIT_S, fatal: bool = False, **arguments: Any) -> list[Any]:
        """Run a job; return its results by rank: `Failed` if it raised, None if the worker ended.

        fatal: the job breaks Horovod, so each worker ends after its answer, as a training script would.
        """
        if not self._workers:
            self._start()
            limit += START_LIMIT_S
        self._signal(signal.SIGCONT)
        for worker in self._workers:
            assert worker.stdin is not None
            pickle.dump((job, arguments, fatal), worker.stdin)
            worker.stdin.flush()
        results = [None] * self.size
        try:
            self._collect(results, time.monotonic() + limit, limit, job)
        except BaseException:
            self.close()
            raise
        if fatal:
            self.close()
        elif any(worker.poll() is not None for worker in self._workers):
            tails = self._tails()
            self.close()
            raise AssertionError(f"a worker ended during {job}\n{tails}")
        self._signal(signal.SIGSTOP)
        return results

    def _signal(self, number: signal.Signals) -> None:
        for worker in self._workers:
            with suppress(ProcessLookupError):  # it has ended; the job tells
                os.killpg(worker.pid, number)

    def _start(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._logs = [folder / f"worker{rank}.log" for rank in range(self.size)]
        if DISTRIBUTED in self._transports:
            settings = [{**os.environ, "RANK": str(r), "WORLD_SIZE": str(self.size)} for r in range(self.size)]
        else:
            settings = self._stack.enter_context(environments(self.size))
        for env, log, transport in zip(settings, self._logs, self._transports, strict=True):
            env |= {
                "POOL_TRANSPORT": transport,
                "POOL_FOLDER": str(folder),
                "HOROVOD_STALL_CHECK_TIME_SECONDS": str(STALL_WARNING_S),
                "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(STALL_SHUTDOWN_S),
                "HOROVOD_GLOO_TIMEOUT_SECONDS": "3600",  # its clock goes on while the processes are stopped
                "OMP_NUM_THREADS": "1",
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
                **self._variables,
            }
            command = [sys.executable, "-m", "support.pool_worker"]
            with log.open("wb") as sink:
                worker = subprocess.Popen(
                    command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, start_new_session=True
                )
            self._workers.append(worker)

    def _collect(self, results: list[Any], deadline: float, limit: float, job: str) -> None:
        waiting = selectors.DefaultSelector()
        for rank, worker in enumerate(self._workers):
            assert worker.stdout is not None
            waiting.register(worker.stdout, selectors.EVENT_READ, rank)
        while waiting.get_map():
            ready = waiting.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [key.data for key in waiting.get_map().values()]
                raise AssertionError(f"{job}: no answer from ranks {late} within {limit:.0f} s\n{self._tails()}")
            for key, _ in ready:
                with suppress(EOFError):  # the worker has ended: its result stays None
                    results[key.data] = pickle.load(key.fileobj)
                waiting.unregister(key.fileobj)

    def _tails(self) -> str:
        """Return the last lines of the workers' output, in which Horovod's stall check names tensors and ranks."""
        return "\n".join(
            f"--- rank {rank}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            for rank, log in enumerate(self._logs)
        )

    def close(self) -> None:
        for worker in self._workers:
            if worker.poll() is None:
                os.killpg(worker.pid, 9)
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # a job was still buffered for a worker that has ended
                        pipe.close()
        self._workers = []
        self._stack.close()


PoolOf = Callable[[int], Pool]
