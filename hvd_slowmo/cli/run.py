"""The subcommand `run`: horovodrun with readable output and the failed worker's error at the end."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hvd_slowmo.cli.workers import Job
from hvd_slowmo.core.step.preemption import PREEMPTED
from hvd_slowmo.errors import CommandError, spell_error


def add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `run` to the command line."""
    # Nothing begins an option here, so that all arguments reach Horovod's own parser, --help included.
    parser = commands.add_parser(
        "run", help="start a job's workers, with the options of horovodrun", add_help=False, prefix_chars="\0"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    try:
        from horovod.runner import gloo_run, launch
    except ImportError as error:
        raise CommandError(f"Horovod can't be imported: {error}. Run: hvd-slowmo install-horovod") from error
    parsed = _parsed(launch, arguments.arguments)
    job = Job(elastic=launch._is_elastic(parsed))
    with _prepared(gloo_run, job), _interpreter_first():
        try:
            launch._run(parsed)
            if job.elastic and job.received is None:
                return 0  # the job has done without the workers that failed
        except Exception as error:  # Horovod raises its own refusals as errors of any class
            if not job.ended:
                raise CommandError(spell_error(error)) from error
    return _status(job)


def _parsed(launch: Any, arguments: Sequence[str]) -> Any:
    """Return the arguments as Horovod's parser has them; it ends the process where they are wrong."""
    before, sys.argv = sys.argv, ["hvd-slowmo run", *arguments]
    try:
        parsed = launch.parse_args()
    finally:
        sys.argv = before
    if parsed.command[:1] == ["--"]:
        del parsed.command[0]
    if not parsed.command:
        raise CommandError("give the workers' command: hvd-slowmo run -np 4 python train.py")
    if parsed.log_level:
        logging.addLevelName(logging.NOTSET, "TRACE")
        logging.basicConfig(level=logging.getLevelName(parsed.log_level))
    return parsed


@contextmanager
def _prepared(gloo_run: Any, job: Job) -> Iterator[None]:
    """Have Horovod's launcher start its workers as `job`."""
    replaced: list[tuple[Any, str, Any]] = [
        (gloo_run, "safe_shell_exec", SimpleNamespace(execute=job.execute)),
        (gloo_run, "register_shutdown_event", lambda: _register(job)),
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in originals:
            setattr(module, name, value)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _register(job: Job) -> threading.Event:
    """Pass signals on to the workers. The event, with which Horovod would end them instead, is never set."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, job.pass_on)
    return threading.Event()


@contextmanager
def _interpreter_first() -> Iterator[None]:
    """Find `python` beside this one: the virtual environment may not be activated."""
    before = os.environ.get("PATH")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before or os.defpath])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


def _status(job: Job) -> int:
    """Return the exit status of the job, and show the error of the worker that failed."""
    if job.received is not None:
        if job.received != signal.SIGPIPE:  # of `head`, say, which has ended as it should
            print(f"hvd-slowmo run: ended by {signal.Signals(job.received).name}", file=sys.stderr)
        saved = {worker.status for worker in job.ended if worker.stopped} == {PREEMPTED}  # not those lost before
        return PREEMPTED if saved else 128 + job.received
    failed = job.failure
    if failed is None or failed.status is None:
        return 0
    lines = failed.error.lines()
    end = "; the end of its error output:" if lines else ""
    print(f"\nhvd-slowmo run: rank {failed.rank} ended with {_spell(failed.status)}{end}", file=sys.stderr)
    for line in lines:
        print(line, file=sys.stderr)
    return failed.status


def _spell(status: int) -> str:
    try:
        return f"exit status {status} ({signal.Signals(status - 128).name})"
    except ValueError:
        return f"exit status {status}"
