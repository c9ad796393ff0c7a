"""Run commands with a log and progress reports, and stop them together with their child processes."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from hvd_slowmo.installer.progress import Meter
from hvd_slowmo.installer.reporter import Reporter

_TICK_SECONDS = 0.5
_ERROR = re.compile(r"(?<!\w)error:|^CMake Error|undefined reference|multiple definition", re.IGNORECASE)


def run(
    command: Sequence[str],
    log: Path,
    reporter: Reporter,
    *,
    what: str,
    meter: Meter | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> int:
    """Run `command`, append its stdout and stderr to `log`, and return its exit status.

    While the command runs, the reporter regularly receives the elapsed time and, with a meter, the completed share.

    Args:
        command: program and arguments.
        log: file that receives the output.
        reporter: receives each line and the progress.
        what: description of the action, such as "building Horovod".
        meter: reads the output and measures the progress.
        env: environment variables; None: those of this process.
        cwd: working directory; None: that of this process.

    Raises:
        OSError: the command cannot be started, or the log cannot be written.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    def report() -> None:
        seconds = time.monotonic() - started
        percent, note = (None, "") if meter is None else meter.at(seconds)
        reporter.progress(what, percent, seconds, note)

    with log.open("a", encoding="utf-8", errors="replace") as sink:
        sink.write(f"$ {' '.join(command)}\n")
        sink.flush()
        process = subprocess.Popen(
            command,
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # stop() ends a compiler's child processes too
        )
        try:
            assert process.stdout is not None
            lines: queue.Queue[str | None] = queue.Queue()
            threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True).start()
            while True:
                try:
                    line = lines.get(timeout=_TICK_SECONDS)
                except queue.Empty:
                    report()
                    continue
                if line is None:
                    break
                sink.write(line)
                reporter.detail(line.rstrip("\n"))
                if meter is not None:
                    meter.read(line.rstrip("\n"), time.monotonic() - started)
                    report()
            return process.wait()
        finally:
            stop(process)
            reporter.finish_progress()


def stop(process: subprocess.Popen[str]) -> None:
    """Kill a process that leads its session, with all its child processes, and close its streams.

    A process that has already ended is not signaled.
    """
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def first_error(log: Path, count: int = 8) -> str:
    """Return `count` lines of a log, from the first error of the compiler or CMake on.

    Without such an error, return the last `count` lines.

    Raises:
        OSError: the log cannot be read.
    """
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines):
        if _ERROR.search(line):
            return "\n".join(lines[number : number + count])
    return "\n".join(lines[-count:])


def _read_lines(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError):  # the stream was closed because the command was stopped
        for line in stream:
            lines.put(line)
    lines.put(None)
