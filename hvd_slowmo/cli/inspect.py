"""The subcommand `inspect`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvd_slowmo.cli.table import table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hvd_slowmo.checkpoint.file import Arrays


def add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `inspect` to the command line."""
    parser = commands.add_parser(
        "inspect",
        help="show what is in a checkpoint, and check it",
        description="Reads a checkpoint of SlowMo.save with all files of its workers, checks every byte, and prints "
        "settings, step, tensors, sizes and files. Needs no framework. Exit status 1 if a file is damaged or missing.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="what was given to save")
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from hvd_slowmo.checkpoint.file import CheckpointError

    path: Path = arguments.file
    try:
        facts, rows, step = _read(path)
    except (CheckpointError, OSError) as error:
        print(f"hvd-slowmo inspect: {error}", file=sys.stderr)
        return 1
    if "rank" in facts:
        print(f"{path}: what rank {facts['rank']} of {facts['workers']} alone has.\n")
        print(table(("tensor", "type", "shape", "bytes"), [row[:-1] for row in sorted(rows)]))
        return 0
    if facts["config"] is None:
        print(f"{path}: weights alone, with which a training can begin")
    else:
        print(f"{path}: {_position(facts, step)}\n")
        print(table(("setting", "value"), [(key, repr(value)) for key, value in facts["config"].items()]))
    print("\n" + table(("tensor", "type", "shape", "bytes", "of"), sorted(rows)))
    _show_files(path, facts)
    return 0


def _read(path: Path) -> tuple[dict[str, Any], list[tuple[str, ...]], int]:
    """Facts, a row for each tensor, and the step (0 of weights alone).

    One file's arrays at a time: those of all workers may be more than the memory holds.

    Raises:
        CheckpointError: a file is damaged or missing.
    """
    from hvd_slowmo.checkpoint.file import read
    from hvd_slowmo.checkpoint.job import read_worker

    facts, arrays, _ = read(path)
    step = int(arrays.get("progress/step", 0))  # in this file: workers save after the same one
    rows = _rows(arrays, "all workers")
    del arrays
    for rank, id_ in facts.get("files", {}).items():
        rows += _rows(read_worker(path, int(rank), id_), f"rank {rank}")
    return facts, rows, step


def _rows(arrays: Arrays, of: str) -> list[tuple[str, ...]]:
    return [(*_row(name, value), of) for name, value in arrays.items()]


def _show_files(path: Path, facts: Mapping[str, Any]) -> None:
    from hvd_slowmo.checkpoint.job import KINDS, worker_file

    files = [path, *(worker_file(path, int(rank), id_) for rank, id_ in facts["files"].items())]
    print("\n" + table(("file", "bytes"), [(file.name, str(file.stat().st_size)) for file in files]))
    lost = ", ".join(KINDS[kind] for kind in facts["lost"])
    print(
        f"\nResumes on {facts['workers']} workers only: each has its own {lost}."
        if lost
        else "\nResumes on any number of workers."
    )


def _position(facts: Mapping[str, Any], step: int) -> str:
    config = facts["config"]
    place = ""
    if step <= config["warmup_steps"] and config["warmup_steps"]:
        place = f" (warm-up, {config['warmup_steps']} steps)"
    elif config["tau"] is not None:
        place = f" ({(step - config['warmup_steps']) % config['tau']} of {config['tau']} in its block)"
    workers = f"{facts['workers']} worker{'s' if facts['workers'] > 1 else ''}"
    names = "" if facts["naming"] == "wire" else f", by names that only {facts['naming']} has"
    return f"{workers} at step {step}{place}, base optimizer {facts['base']}{names}"


def _row(name: str, value: NDArray[Any]) -> tuple[str, str, str, str]:
    return name, str(value.dtype), "x".join(map(str, value.shape)) or "scalar", str(value.nbytes)
