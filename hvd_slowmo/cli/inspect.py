"""The subcommand `inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hvd_slowmo.checkpoint import file, job
from hvd_slowmo.checkpoint.file import Arrays
from hvd_slowmo.cli.table import table

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
    parser.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    path: Path = arguments.file
    facts, rows, step = _read(path)
    if "rank" in facts:
        print(f"{path}: the file of rank {facts['rank']} of {facts['workers']} alone.\n")
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


def _read(path: Path) -> tuple[dict[str, Any], list[Row], int]:
    """Return the facts, a row for each tensor, and the step (0 of weights alone).

    One file's arrays at a time: those of all workers may be more than the memory holds.

    Raises:
        CheckpointError: a file is damaged or missing.
    """
    facts, arrays, _ = file.read(path)
    step = int(arrays.get("progress/step", 0))  # in this file: workers save after the same one
    rows = _rows(arrays, "all workers")
    del arrays
    for rank, id_ in facts.get("files", {}).items():
        rows += _rows(job.read_worker(path, int(rank), id_), f"rank {rank}")
    return facts, rows, step


def _rows(arrays: Arrays, owner: str) -> list[Row]:
    return [(*_describe(name, value), owner) for name, value in arrays.items()]


def _describe(name: str, value: NDArray[Any]) -> Row:
    return name, str(value.dtype), "x".join(map(str, value.shape)) or "scalar", str(value.nbytes)


def _show_files(path: Path, facts: Mapping[str, Any]) -> None:
    files = [path, *(job.worker_file(path, int(rank), id_) for rank, id_ in facts["files"].items())]
    print("\n" + table(("file", "bytes"), [(part.name, str(part.stat().st_size)) for part in files]))
    own = ", ".join(job.KINDS[kind] for kind in facts["per_worker"])
    if own:
        print(f"\nResumes on {facts['workers']} workers only: each has its own {own}.")
    else:
        print("\nResumes on any number of workers.")


def _position(facts: Mapping[str, Any], step: int) -> str:
    config = facts["config"]
    place = ""
    if step <= config["warmup_steps"] and config["warmup_steps"]:
        place = f" (warm-up, {config['warmup_steps']} steps)"
    elif config["tau"] is not None:
        place = f" ({(step - config['warmup_steps']) % config['tau']} of {config['tau']} in its block)"
    workers = f"{facts['workers']} worker{'s' if facts['workers'] > 1 else ''}"
    names = "" if facts["naming"] == "wire" else f", by names that only {facts['naming']} has"
    return f"{workers} at step {step}{place}, inner optimizer {facts['inner_optimizer']}{names}"
