"""The subcommand `inspect`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
    from hvd_slowmo.safefile import SnapshotError, read
    from hvd_slowmo.snapshot import KINDS, read_worker, worker_file

    path: Path = arguments.file
    try:
        facts, common, _ = read(path)
        if "rank" in facts:
            print(f"{path}: what rank {facts['rank']} of {facts['workers']} alone has.\n")
            print(_table(("tensor", "type", "shape", "bytes"), [_row(*item) for item in sorted(common.items())]))
            return 0
        workers = {rank: read_worker(path, int(rank), id_) for rank, id_ in facts["files"].items()}
    except (SnapshotError, OSError) as error:
        print(f"hvd-slowmo inspect: {error}", file=sys.stderr)
        return 1
    if facts["config"] is None:
        print(f"{path}: weights alone, with which a training can begin")
    else:
        everything = {**next(iter(workers.values()), {}), **common}
        print(f"{path}: {_position(facts, int(everything['progress/step']))}\n")
        print(_table(("setting", "value"), [(key, repr(value)) for key, value in facts["config"].items()]))
    rows = [(*_row(name, value), "all workers") for name, value in common.items()]
    for rank, arrays in workers.items():
        rows += [(*_row(name, value), f"rank {rank}") for name, value in arrays.items()]
    print("\n" + _table(("tensor", "type", "shape", "bytes", "of"), sorted(rows)))
    files = [path, *(worker_file(path, int(rank), id_) for rank, id_ in facts["files"].items())]
    print("\n" + _table(("file", "bytes"), [(file.name, str(file.stat().st_size)) for file in files]))
    lost = ", ".join(KINDS[kind] for kind in facts["lost"])
    print(
        f"\nResumes on {facts['workers']} workers only: each has its own {lost}."
        if lost
        else "\nResumes on any number of workers."
    )
    return 0


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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)
