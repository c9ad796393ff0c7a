"""Checkpoints of a whole job, the same for every framework; docs/checkpoints.md describes the files.

What is equal on all workers is in one file, which rank 0 writes last. What differs is in a file per worker, whose name
has its content's checksum: the files of the checkpoint before stay whole until this one is.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from hvd_slowmo.checkpoint.file import TEMPORARY, Arrays, CheckpointError, checksum, identity, read, write
from hvd_slowmo.checkpoint.state import OF_THIS_WORKER, Named, Side, at_rest, beginning, collect, facts_of, prepare
from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.core.handshake import agreed
from hvd_slowmo.core.schedule import workers_equal
from hvd_slowmo.wire.tensors import describe

AnyPath = str | os.PathLike[str]

KINDS = {
    "model": "parameters and statistics",
    "anchor": "the anchor",
    "v": "the slow momentum",
    "average": "the moving average of the weights",
    "push": "push-sum weights and numerators",
    "sent": "messages in flight",
    "progress": "the position",
    "base": "the base optimizer's buffers",
}
"""What the first parts of the arrays' names mean."""

_RANK = r"\.rank\d+-[0-9a-f]{16}"
"""What `worker_file` has behind the common file's name."""

_RATES = ("progress/learning_rate", "progress/rates")

_CURES = {
    "base": "Buffers are common with buffers='reset' or 'average', right after an outer step.",
    "": "Save right after an outer step or join(), with average=True.",
}


class Contents(NamedTuple):
    """A checkpoint as one worker reads it."""

    facts: dict[str, Any]  # of the common file
    common: Arrays  # its arrays
    own: Arrays  # those of this worker's file
    id: str  # tells checkpoints apart


def save(make: Callable[[], Side], comm: Comm, name: str, path: AnyPath) -> None:
    """Write a checkpoint of the whole job. A collective, after the same step.

    Args:
        make: gives this worker's side; what it raises is raised on every worker.
        name: of the optimizer.
        path: of the common file, the same on every worker, in a folder that there is and that all of them see.

    Raises:
        ValueError: on every worker, if something can't be saved or written on one; the checkpoint that was there before
            is whole then.
    """

    def gathered() -> tuple[tuple[Path, Side, dict[str, Any], Arrays], dict[str, Any]]:
        target = Path(path)
        if target.is_dir() or not target.parent.is_dir():
            raise CheckpointError(f"`path` must be of a file, in a folder that there is. Received: {target}")
        side = make()
        facts = facts_of(side)
        return (target, side, facts, collect(side)), {"path": str(target), **facts}

    target, side, facts, arrays = agreed(comm, f"{name}.save", gathered, {})
    sums = {key: checksum(value) for key, value in arrays.items()}
    step = int(side.progress.step)
    everyone = comm.gather(f"{name}.save.sums", (step, sums))
    if len({other for other, _ in everyone}) > 1:
        here = ", ".join(f"rank {r} step {other}" for r, (other, _) in zip(comm.ranks, everyone, strict=True))
        raise ValueError(f"{name}: the workers are not at the same step: {here}. Save after the same one, or join().")
    first = everyone[0][1]
    common = {key for key in first if all(each.get(key) == first[key] for _, each in everyone)}
    written = agreed(comm, f"{name}.save", lambda: (_write_own(target, comm, arrays, sums, common), {}), {})
    ids = comm.gather(f"{name}.save.files", written)
    # Workers of two frameworks are equal up to rounding there: each has its own, and rank 0's serves everybody.
    alike = workers_equal(side.config, step, int(side.progress.since))
    facts = {
        **facts,
        "why": side.named.why,
        "workers": comm.size,
        "files": {str(rank): id_ for rank, id_ in enumerate(ids) if id_},
        "lost": _lost(everyone, common, alike, at_rest(side.progress)),
    }

    def write_common() -> tuple[bool, dict[str, Any]]:
        if comm.rank == 0:
            there = common | {key for key in arrays if alike and _equal_there(key)}
            write(target, facts, {key: value for key, value in arrays.items() if key in there}, sums)
        return True, {}

    agreed(comm, f"{name}.save", write_common, {})
    if comm.rank == 0:
        _remove_older(target, {worker_file(target, rank, id_) for rank, id_ in enumerate(ids)})


def load(make: Callable[[], Side], comm: Comm, name: str, path: AnyPath) -> None:
    """Continue from a checkpoint. A collective.

    Args:
        make: as in `save`.
        name: of the optimizer.
        path: as in `save`.

    Raises:
        ValueError: on every worker, if a file can't be read or does not fit on one; nothing has been changed then.
    """

    def prepared() -> tuple[Callable[[], None], dict[str, Any]]:
        contents = read_checkpoint(Path(path), comm.rank, comm.size)
        side, facts = make(), contents.facts
        if facts["config"] is None:
            check_model(side.named, facts)
            arrays = beginning(side, contents.common)
        else:
            _check(side, comm, facts)
            arrays = {**contents.common, **contents.own}
        return prepare(side, facts, arrays), {"checkpoint": contents.id}

    agreed(comm, f"{name}.load", prepared, {})()


def write_weights(path: Path, named: Named, values: Mapping[str, NDArray[Any]]) -> None:
    """Write a checkpoint of a model's weights alone, with which a training can begin.

    Args:
        values: by the names of the entries.

    Raises:
        OSError: it can't be written.
    """
    facts = {"config": None, "naming": named.naming, "why": named.why, "entries": describe(named.entries)}
    arrays = {f"model/{entry.name}": values[entry.name] for entry in named.entries}
    write(path, {**facts, "workers": 1, "files": {}, "lost": []}, arrays)


def read_checkpoint(path: Path, rank: int, size: int) -> Contents:
    """The common file and, for a job of as many workers as have saved it, one worker's.

    Raises:
        CheckpointError: a file is missing, damaged, foreign, newer, or another checkpoint's.
    """
    facts, common, id_ = read(path)
    if "rank" in facts:
        raise CheckpointError(f"{path} is what rank {facts['rank']} alone has. Give the checkpoint that it belongs to.")
    own = facts["files"].get(str(rank)) if size == facts["workers"] else None
    return Contents(facts, common, {} if own is None else read_worker(path, rank, own), id_)


def worker_file(path: Path, rank: int, id_: str) -> Path:
    """Where a worker's own part of the checkpoint at `path` is. id_: what the common file says of it."""
    return path.with_name(f"{path.name}.rank{rank}-{id_[:16]}")


def read_worker(path: Path, rank: int, id_: str) -> Arrays:
    """The arrays of `worker_file`.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    file = worker_file(path, rank, id_)
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: it belongs to {path}, which can't be loaded without it.")
    _, arrays, found = read(file)
    if found != id_:
        raise CheckpointError(f"{file} is not the file that belongs to {path}: its content is another.")
    return arrays


def _write_own(target: Path, comm: Comm, arrays: Arrays, sums: Mapping[str, str], common: set[str]) -> str:
    """Write what this worker alone has; its identity, or nothing if there is nothing."""
    own = {key: value for key, value in arrays.items() if key not in common}
    if not own:
        return ""
    facts = {"rank": comm.rank, "workers": comm.size}
    id_ = identity(facts, {key: sums[key] for key in own})
    write(worker_file(target, comm.rank, id_), facts, own, sums)
    return id_


def _equal_there(name: str) -> bool:
    """Whether workers that hold the same state hold this array alike, whatever the base optimizer keeps.

    Learning rates too: Keras rounds them to float32, and a script may give each worker its own.
    """
    return name.split("/")[0] in ("model", "anchor", "v", "average") or name in _RATES


def _lost(everyone: Sequence[tuple[int, Mapping[str, str]]], common: set[str], alike: bool, still: bool) -> list[str]:
    """The kinds of arrays without which a job of another number of workers would not be this one."""
    unneeded = {f"progress/{field}" for field in OF_THIS_WORKER}
    own = {key for _, sums in everyone for key in sums if key not in common}
    own = {key for key in own - unneeded if not key.startswith("rest/") and not (alike and _equal_there(key))}
    kinds = {key.split("/")[0] for key in own} | (set() if still else {"push"})
    return [kind for kind in KINDS if kind in kinds]


def _remove_older(target: Path, listed: set[Path]) -> None:
    """Files of workers that belong to the checkpoint before, or to one that was never finished.

    Every worker has written its own by now: what is unfinished is of saves that were killed.
    """
    name = re.escape(target.name)
    for pattern, expected in (
        (f"{glob.escape(target.name)}.rank*", rf"{name}{_RANK}"),
        (f".*.{glob.escape(target.name)}*", rf"{TEMPORARY}{name}({_RANK})?"),
    ):
        for file in target.parent.glob(pattern):
            if re.fullmatch(expected, file.name) and file not in listed:
                with suppress(OSError):  # it does no harm
                    file.unlink()


def _check(side: Side, comm: Comm, saved: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another training, or one that another number of workers can't continue."""
    own = facts_of(side)
    for key, value in own["config"].items():
        if saved["config"].get(key) != value:
            raise CheckpointError(
                f"the checkpoint was saved with {key}={saved['config'].get(key)!r}, this optimizer has "
                f"{key}={value!r}. Resume with the settings of the run that is resumed."
            )
    check_model(side.named, saved)
    if saved["trained"] != own["trained"]:
        odd = sorted(set(saved["trained"]) ^ set(own["trained"]))
        raise CheckpointError(f"not the same tensors are trained as in the checkpoint: {', '.join(odd[:3])}.")
    if saved["vectors"] != own["vectors"]:
        raise CheckpointError(
            f"the checkpoint has {', '.join(saved['vectors']) or 'nothing'} beside the model, this optimizer keeps "
            f"{', '.join(own['vectors']) or 'nothing'}."
        )
    if saved["workers"] != comm.size:
        _check_resize(comm, saved)
    elif "push" in saved["lost"] and saved["graph"] != own["graph"]:
        raise CheckpointError("the checkpoint was saved with another topology: its function gives another graph now.")


def check_model(named: Named, saved: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another model, by its facts.

    Raises:
        CheckpointError: with the first tensor that differs.
    """
    if saved["naming"] != named.naming:
        raise CheckpointError(
            f"the checkpoint has its tensors by {_naming(saved['naming'])}, here they are by {_naming(named.naming)}: "
            f"{saved['why'] or named.why} A ParameterMap for both makes the names the same."
        )
    own = describe(named.entries)
    for number, (a, b) in enumerate(zip(saved["entries"], own, strict=False)):
        if a != b:
            raise CheckpointError(
                f"the checkpoint is of another model: its tensor {number} is {_spell(a)}, here it is {_spell(b)}."
            )
    if len(saved["entries"]) != len(own):
        raise CheckpointError(
            f"the checkpoint is of another model: it has {len(saved['entries'])} tensors, here there are {len(own)}."
        )


def _check_resize(comm: Comm, saved: Mapping[str, Any]) -> None:
    lost = saved["lost"]
    if lost:
        cures = [_CURES[""]] if lost != ["base"] else []
        cures += [_CURES["base"]] if "base" in lost else []
        raise CheckpointError(
            f"the checkpoint is one of {saved['workers']} workers, this job has {comm.size}, and each of those has its "
            f"own {', '.join(KINDS[kind] for kind in lost)}, which would be lost. {' '.join(cures)}"
        )


def _naming(naming: str) -> str:
    return "the names of a ParameterMap" if naming == "wire" else f"the names of {naming} alone"


def _spell(entry: Sequence[Any]) -> str:
    name, rule, shape, dtype, note = entry
    return f"{name} ({rule}, {dtype}, shape {tuple(shape)}{', ' + note if note else ''})"
