"""Real workers that stay alive and run one job after the other, so that one launch serves many tests.

A job is a function "support.module:name", called on every worker with the same arguments. A job that takes
too long fails with the report of Horovod's stall check, or of torch.distributed's timeout, and the next one gets new
workers. Between two jobs the processes are stopped: Horovod's background threads would take a third of a core for four
idle workers.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from hvd_slowmo.installer.local import environments
from support import forking
from support.pool_worker import DISTRIBUTED, STALL_SHUTDOWN_S, STALL_WARNING_S, Failed, main

ENDS = ("HorovodInternalError", "DistNetworkError")
"""Errors after which the workers can exchange nothing more."""

START_LIMIT_S = 120
JOB_LIMIT_S = (
    240  # a hang is found by the stall check long before; a job of many traces takes minutes on a busy machine
)


class Pool:
    """`size` workers; call `run`.

    transport: the module through which each worker reaches the others: one for all, or one per rank.
    """

    def __init__(self, size: int, transport: str | Sequence[str] = "horovod.torch", **variables: str) -> None:
        self.size = size
        self._transports = [transport] * size if isinstance(transport, str) else transport
        self._variables = variables
        self._workers: list[ForkServerProcess] = []
        self._connections: list[Connection] = []
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
        for connection in self._connections:
            connection.send((job, arguments, fatal))
        results = [None] * self.size
        try:
            self._collect(results, time.monotonic() + limit, limit, job)
        except BaseException:
            self.close()
            raise
        if fatal:
            self.close()
        elif not all(worker.is_alive() for worker in self._workers):
            tails = self._tails()
            self.close()
            raise AssertionError(f"a worker ended during {job}\n{tails}")
        self._signal(signal.SIGSTOP)
        return results

    def _signal(self, number: signal.Signals) -> None:
        for worker in self._workers:
            assert worker.pid is not None
            with suppress(ProcessLookupError):  # it has ended, which the job tells, or has no group of its own yet
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
                **self._variables,
            }
            ours, theirs = forking.CONTEXT.Pipe()
            self._workers.append(forking.start(main, theirs, env, log))
            theirs.close()
            self._connections.append(ours)

    def _collect(self, results: list[Any], deadline: float, limit: float, job: str) -> None:
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(waiting.values())
                raise AssertionError(f"{job}: no answer from ranks {late} within {limit:.0f} s\n{self._tails()}")
            for connection in ready:
                assert isinstance(connection, Connection)
                with suppress(EOFError, ConnectionResetError):  # the worker has ended: its result stays None
                    results[waiting[connection]] = connection.recv()
                del waiting[connection]

    def _tails(self) -> str:
        """Return the last lines of the workers' output, in which Horovod's stall check names tensors and ranks."""
        return "\n".join(
            f"--- rank {rank}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            for rank, log in enumerate(self._logs)
        )

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        for worker, connection in zip(self._workers, self._connections, strict=True):
            worker.kill()
            worker.join()
            worker.close()
            connection.close()
        self._workers, self._connections = [], []
        self._stack.close()


PoolOf = Callable[[int], Pool]
