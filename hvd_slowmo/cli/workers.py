"""Processes of a job's workers, as Horovod's launcher starts them: their output, their end, and signals to them.

Horovod's own function for a worker starts a Python process beside each, passes SIGINT on as SIGTERM, and mixes the
states of the workers' progress bars.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TextIO

from hvd_slowmo.cli.output import LastError, copy_lines
from hvd_slowmo.core.step.preemption import ONE_SIGNAL_S

SECONDS_AFTER_FAILURE = 2.0
"""Time in which the others can end by themselves, with an error that may be the cause of the first one."""

SECONDS_TO_END = 5.0
"""Time from SIGTERM to SIGKILL when another worker has failed, as in horovodrun."""

SECONDS_TO_SAVE = 30.0
"""Time from a signal to the launcher to SIGKILL: workers may save first. As in torchrun, and SLURM's KillWait."""

# The shell outlives signals to its process group, and ends with the worker's status. Its child ends the group when
# stdin does, which is the launcher's end of a pipe: a launcher that is killed leaves no worker behind.
_SHELL = f"""
trap : INT TERM
exec 3<&0 </dev/null
(trap '' INT TERM; read -r _ <&3; kill -TERM 0; sleep {SECONDS_TO_SAVE:.0f}; kill -KILL 0) >/dev/null 2>&1 &
exec 3<&-
eval "$1"
"""


@dataclass
class Worker:
    """One worker of a job.

    Attributes:
        rank: of the worker.
        process: its shell, the leader of a process group.
        error: the end of its stderr.
        status: exit status, 128 + n after signal n; None while it runs.
        stopped: it was still running when the job was ended.
    """

    rank: int
    process: subprocess.Popen[bytes]
    error: LastError = field(default_factory=LastError)
    status: int | None = None
    stopped: bool = False

    def send(self, number: int) -> None:
        """Send a signal to the process group, if it is there."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


class Job:
    """The workers of one job.

    Args:
        elastic: True if the job goes on without a worker that fails.

    Attributes:
        elastic: as given.
        ended: workers, in the order of their ends.
        received: the signal that ended the job, SIGPIPE if nobody reads the output any more; None if none has.

    Example:
        >>> job = Job(elastic=False)
        >>> job.execute("exit 3", index=0), job.failure.status
        (0, 3)
    """

    def __init__(self, elastic: bool) -> None:
        self.elastic = elastic
        self._lock = threading.RLock()  # a signal's handler may interrupt its holder
        self._running: list[Worker] = []
        self._output = threading.Lock()
        self._stopped = False
        self.ended: list[Worker] = []
        self.received: int | None = None
        self._first_at: float | None = None
        self._hurried = threading.Event()  # a second signal has come: nothing is waited for

    @property
    def failure(self) -> Worker | None:
        """The first worker that failed by itself, and not because another one is gone; None if none."""
        failed = [worker for worker in self.ended if worker.status]
        failed = [worker for worker in failed if not worker.stopped] or failed
        causes = [worker for worker in failed if not worker.error.consequence]
        return next(iter(causes or failed), None)

    def execute(
        self,
        command: str,
        index: int,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        events: Sequence[Any] = (),
        prefix_output_with_timestamp: bool = False,
    ) -> int:
        """Run a worker to its end; the parameters are those of `safe_shell_exec.execute`, whose place it takes.

        Args:
            command: for the shell.
            index: the worker's rank.
            stdout, stderr: receive the output; None for this process' own.
            events: threading.Event objects that end the worker of an elastic job; those of others are never set.
            prefix_output_with_timestamp: begin lines with the time.

        Returns:
            The exit status if elastic, otherwise 0: `failure` has it, and Horovod would report in its own words.
        """
        with self._lock:
            if self._stopped:
                return 1
            process = subprocess.Popen(
                ["/bin/sh", "-c", _SHELL, "sh", command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            worker = Worker(index, process)
            self._running.append(worker)
        assert process.stdout is not None
        assert process.stderr is not None

        def shown(stream: TextIO) -> Callable[[str], None]:
            def show(line: str) -> None:
                moment = f"{time.asctime()} " if prefix_output_with_timestamp else ""
                try:
                    with self._output:
                        stream.write(f"{moment}[{index}] {line}\n")
                        stream.flush()
                except BrokenPipeError:  # nobody reads any more; the worker's own pipe is still emptied
                    self._end_unread()

            return show

        show_error = shown(stderr or sys.stderr)

        def show_and_keep(line: str) -> None:
            worker.error.add(line)
            show_error(line)

        ended = threading.Event()
        readers = [
            threading.Thread(target=copy_lines, args=(process.stdout.fileno(), shown(stdout or sys.stdout), ended)),
            threading.Thread(target=copy_lines, args=(process.stderr.fileno(), show_and_keep, ended)),
        ]
        for reader in readers:
            reader.daemon = True
            reader.start()
        for event in events if self.elastic else ():
            threading.Thread(target=self._end_on, args=(worker, event, ended), daemon=True).start()
        status = process.wait()
        ended.set()
        worker.send(signal.SIGKILL)  # the shell's child, and what the worker has left behind
        self._record(worker, status if status >= 0 else 128 - status)  # the others need not wait for its output
        for reader in readers:
            while reader.is_alive() and not self._hurried.is_set():  # nobody may read what the job writes
                reader.join(0.2)
        for pipe in (process.stdin, process.stdout, process.stderr) if not self._hurried.is_set() else ():
            assert pipe is not None
            pipe.close()
        return status if self.elastic else 0

    def pass_on(self, number: int, _: FrameType | None = None) -> None:
        """Send a signal to all workers, and SIGKILL after a while or at a second one; a handler of signals."""
        now = time.monotonic()
        with self._lock:
            first, self._first_at = self._first_at is None, self._first_at or now
            if first or now - self._first_at > ONE_SIGNAL_S:
                self.received = number
                if not first:
                    self._hurried.set()
                self._stop(number if first else signal.SIGKILL, SECONDS_TO_SAVE)

    def _end_unread(self) -> None:
        with self._lock:
            if self.received is None:
                self.received = signal.SIGPIPE
                self._stop(signal.SIGTERM, SECONDS_TO_SAVE)

    def _record(self, worker: Worker, status: int) -> None:
        with self._lock:
            worker.status = status
            self._running.remove(worker)
            self.ended.append(worker)
            if status and not self.elastic and not self._stopped:
                self._stopped = True  # start no more
                self._later(SECONDS_AFTER_FAILURE, signal.SIGTERM)

    def _stop(self, number: int, seconds: float = SECONDS_TO_END) -> None:
        """Send a signal to all workers, and SIGKILL after some seconds."""
        with self._lock:
            self._stopped = True
            for worker in self._running:
                worker.stopped = True
                worker.send(number)
            if number != signal.SIGKILL and self._running:
                self._later(seconds, signal.SIGKILL)

    def _later(self, seconds: float, number: int) -> None:
        timer = threading.Timer(seconds, self._stop, (number,))
        timer.daemon = True
        timer.start()

    def _end_on(self, worker: Worker, event: Any, ended: threading.Event) -> None:
        while not event.wait(1.0):
            if ended.is_set():
                return
        worker.send(signal.SIGTERM)
        if not ended.wait(SECONDS_TO_END):
            worker.send(signal.SIGKILL)
