"""The subcommand `inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hvd_slowmo.checkpoint import compatibility, file, job
from hvd_slowmo.checkpoint.facts import Facts, ModelFacts, TrainingFacts, WeightsFacts, WorkerFacts, plain
from hvd_slowmo.checkpoint.file import Arrays
from hvd_slowmo.checkpoint.leftovers import clean
from hvd_slowmo.checkpoint.paths import worker_file
from hvd_slowmo.cli.console import show
from hvd_slowmo.cli.table import table
from hvd_slowmo.errors import CheckpointError

Row = tuple[str, ...]
"""Name, type, shape, bytes and owner of a tensor."""


def add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `inspect` to the command line."""
    parser = commands.add_parser(
        "inspect",
        help="show the contents of a checkpoint, and check it",
        description="Reads a checkpoint of SlowMo.save with all files of its workers, checks every byte, and prints "
        "settings, step, tensors, sizes and files. Needs no framework. The exit status is 1 if a file is damaged or "
        "missing.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the path that was given to save")
    parser.add_argument(
        "--clean",
        action="store_true",
        help="instead, remove the files that killed saves have left, of this checkpoint or of all in a directory; "
        "files of a running save are kept",
    )
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    path: Path = arguments.file
    if arguments.clean:
        removed = clean(path)
        show("".join(f"removed {file}\n" for file in removed) or f"{path}: killed saves have left nothing")
        return 0
    facts, rows, step = _read(path)
    if isinstance(facts, WorkerFacts):
        show(f"{path}: the file of rank {facts.rank} of {facts.workers} alone.\n")
        show(table(("tensor", "type", "shape", "bytes"), [row[:-1] for row in sorted(rows)]))
        return 0
    if isinstance(facts, WeightsFacts):
        show(f"{path}: weights alone, with which a training can begin")
    else:
        show(f"{path}: {_position(facts, step)}\n")
        show(table(("setting", "value"), [(key, repr(value)) for key, value in plain(facts.config).items()]))
    show("\n" + table(("tensor", "type", "shape", "bytes", "of"), sorted(rows)))
    _show_files(path, facts)
    return 0


def _read(path: Path) -> tuple[Facts, list[Row], int]:
    """Return the facts, a row for each tensor, and the step (0 of weights alone).

    One file's arrays at a time: those of all workers may be more than the memory holds.

    Raises:
        CheckpointError: a file is damaged or missing.
    """
    facts, arrays, _ = file.read(path)
    step = _step(path, arrays) if isinstance(facts, TrainingFacts) else 0
    rows = _rows(arrays, "all workers")
    del arrays
    files = {} if isinstance(facts, WorkerFacts) else facts.files
    for rank, id_ in files.items():
        rows += _rows(job.read_worker(path, rank, id_), f"rank {rank}")
    return facts, rows, step


def _step(path: Path, arrays: Arrays) -> int:
    """Return the step, which is in the common file: workers save after the same one."""
    step = arrays.get("progress/step")
    if step is None or step.shape or step.dtype.kind != "i":
        found = "none" if step is None else f"{step.dtype} of shape {step.shape}"
        raise CheckpointError(f"{path} must have 'progress/step', an integer. Received: {found}")
    return int(step)


def _rows(arrays: Arrays, owner: str) -> list[Row]:
    return [(*_describe(name, value), owner) for name, value in arrays.items()]


def _describe(name: str, value: NDArray[Any]) -> Row:
    return name, str(value.dtype), "x".join(map(str, value.shape)) or "scalar", str(value.nbytes)


def _show_files(path: Path, facts: ModelFacts) -> None:
    files = [path, *(worker_file(path, rank, id_) for rank, id_ in facts.files.items())]
    show("\n" + table(("file", "bytes"), [(part.name, str(part.stat().st_size)) for part in files]))
    own = ", ".join(compatibility.KINDS[kind] for kind in facts.per_worker)
    if own:
        show(f"\nResumes on {facts.workers} workers only: each has its own {own}.")
    else:
        show("\nResumes on any number of workers.")


def _position(facts: TrainingFacts, step: int) -> str:
    config = facts.config
    place = ""
    if step <= config.warmup_steps and config.warmup_steps:
        place = f" (warm-up, {config.warmup_steps} steps)"
    elif config.tau is not None:
        place = f" ({(step - config.warmup_steps) % config.tau} of {config.tau} in its block)"
    workers = f"{facts.workers} worker{'s' if facts.workers > 1 else ''}"
    names = "" if facts.naming == "wire" else f", by names that only {facts.naming} has"
    return f"{workers} at step {step}{place}, inner optimizer {facts.inner_optimizer}{names}"
