"""Checkpoints of a whole job, the same for every framework; docs/checkpoints.md describes the files.

Arrays that are equal on all workers are in one file, which rank 0 writes last. The others are in a file per worker,
whose name has a checksum of its content: the files of the checkpoint before stay whole until this one is complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.checkpoint.compatibility import KINDS, check_model, check_training
from hvd_slowmo.checkpoint.facts import (
    ModelFacts,
    TrainingFacts,
    WeightsFacts,
    WorkerFacts,
    parse,
)
from hvd_slowmo.checkpoint.file import Arrays, checksum, identity, read, write
from hvd_slowmo.checkpoint.leftovers import remove_leftovers, writing
from hvd_slowmo.checkpoint.naming import NamedTensors
from hvd_slowmo.checkpoint.paths import worker_file
from hvd_slowmo.checkpoint.state import (
    LEARNING_RATE,
    NOT_NEEDED,
    WorkerState,
    at_rest,
    collect,
    facts_of,
    first_state,
    prepare,
)
from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core.parts.schedule import workers_equal
from hvd_slowmo.core.start.handshake import agreed
from hvd_slowmo.errors import CheckpointError, CheckpointFileError
from hvd_slowmo.wire.tensors import describe

AnyPath: TypeAlias = str | os.PathLike[str]
T = TypeVar("T")

EXTRA = "extra/"
"""Begins the names of arrays that `load` leaves out: state of the script, see `hvd_slowmo.checkpoint.periodic`."""

_RATES = (LEARNING_RATE, "progress/rate_sums")


class Contents(NamedTuple):
    """A checkpoint as one worker reads it."""

    facts: ModelFacts  # of the common file
    common: Arrays  # its arrays
    own: Arrays  # those of this worker's file
    id: str  # tells checkpoints apart


@dataclass(frozen=True)
class Collected:
    """One worker's state, on its way to the files."""

    path: Path
    state: WorkerState
    facts: dict[str, Any]
    arrays: Arrays
    sums: dict[str, str]

    @property
    def step(self) -> int:
        return int(self.state.progress.step)

    @property
    def workers_equal(self) -> bool:
        """True if all workers hold the same state: those of one framework bitwise, others up to rounding."""
        return workers_equal(self.state.config, self.state.progress)


def save(make: Callable[[], WorkerState], comm: ScopedComm, path: AnyPath) -> None:
    """Write a checkpoint of the whole job. A collective, after the same step.

    Args:
        make: returns this worker's state; an exception is raised on every worker.
        comm: the workers, under the optimizer's name.
        path: of the common file, the same on every worker, in an existing directory that all of them see.

    Raises:
        CheckpointFileError: on every worker, if the system refuses a file on one; the old checkpoint is whole then.
        ValueError: on every worker, if something can't be saved on one, with the same consequence.
    """
    with ExitStack() as stack:
        _save(make, comm, path, stack)


def _save(make: Callable[[], WorkerState], comm: ScopedComm, path: AnyPath, stack: ExitStack) -> None:
    saving = comm.scoped("save")

    def collected() -> tuple[Collected, dict[str, Any]]:
        target = Path(path).absolute()  # workers may have different working directories
        if target.is_dir() or not target.parent.is_dir():
            raise CheckpointError(f"`path` must be of a file in an existing directory. Received: {target}")
        if comm.rank == 0 and stack.enter_context(writing(target)):
            remove_leftovers(target)  # saves that are killed one after the other do not fill the disk
        state = make()
        facts, arrays = facts_of(state), collect(state)
        sums = {key: checksum(value) for key, value in arrays.items()}
        return Collected(target, state, facts, arrays, sums), {"path": str(target), **facts}

    worker = _agreed_on_files(saving, collected)
    everyone = saving.gather("sums", (worker.step, worker.sums))
    if len({step for step, _ in everyone}) > 1:
        steps = ", ".join(f"rank {r} step {step}" for r, (step, _) in zip(comm.ranks, everyone, strict=True))
        raise ValueError(
            f"{comm.name}: the workers are not at the same step: {steps}. Save after the same one, or join()."
        )
    all_sums = [sums for _, sums in everyone]
    ids = saving.gather("files", _agreed_on_files(saving, lambda: (write_own(worker, comm, shared(all_sums)), {})))

    def write_last() -> tuple[bool, dict[str, Any]]:
        if comm.rank == 0:
            write_common(worker, comm, all_sums, ids)
        return True, {}

    _agreed_on_files(saving, write_last)
    if comm.rank == 0:
        # Every worker has written its own by now: unfinished files are of saves that were killed.
        remove_leftovers(worker.path, {worker_file(worker.path, rank, id_) for rank, id_ in enumerate(ids)})


def load(make: Callable[[], WorkerState], comm: ScopedComm, path: AnyPath) -> None:
    """Continue from a checkpoint. A collective.

    Args:
        make, comm, path: as in `save`.

    Raises:
        CheckpointFileError: on every worker, if the system refuses a file on one; nothing has been changed then.
        ValueError: on every worker, if a file is damaged or does not fit on one, with the same consequence.
    """

    def prepared() -> tuple[Callable[[], None], dict[str, Any]]:
        contents = read_checkpoint(Path(path), comm.rank, comm.size)
        state, facts = make(), contents.facts
        if isinstance(facts, WeightsFacts):
            check_model(state.tensors, facts)
            arrays, kind = first_state(state, model_arrays(facts, contents.common)), ""
        else:
            check_training(state, comm, facts)
            arrays = {name: x for name, x in {**contents.common, **contents.own}.items() if not name.startswith(EXTRA)}
            kind = facts.inner_optimizer
            if facts.workers != comm.size:
                arrays = {name: x for name, x in arrays.items() if not name.startswith("slice_residual/")}
                arrays |= _mean_residuals(Path(path), facts)
        return prepare(state, kind, arrays), {"checkpoint": contents.id}

    _agreed_on_files(comm.scoped("load"), prepared)()


def write_weights(path: Path, tensors: NamedTensors, values: Mapping[str, NDArray[Any]]) -> None:
    """Write a checkpoint of a model's weights alone, with which a training can begin.

    Args:
        values: by the tensors' names.

    Raises:
        OSError: it can't be written.

    Example:
        >>> import numpy as np, tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory) / "weights.slowmo"
        ...     write_weights(path, NamedTensors(()), {})
        ...     print(read_checkpoint(path, rank=0, size=1).facts.config)
        None
    """
    described = {"naming": tensors.naming, "reason": tensors.reason, "tensors": describe(tensors.specs)}
    facts = parse(described, WeightsFacts, "this model")
    write(path, facts, {f"model/{spec.name}": values[spec.name] for spec in tensors.specs})


def read_checkpoint(path: Path, rank: int, size: int) -> Contents:
    """Read the common file and, for a job of as many workers as have saved it, one worker's.

    Raises:
        CheckpointError: a file is missing, damaged, foreign, of another version, or of another checkpoint.
    """
    facts, common, id_ = read(path)
    if isinstance(facts, WorkerFacts):
        raise CheckpointError(f"{path} is the file of rank {facts.rank} alone. Give the checkpoint that it belongs to.")
    own = facts.files.get(rank) if size == facts.workers else None
    return Contents(facts, common, {} if own is None else read_worker(path, rank, own), id_)


def read_worker(path: Path, rank: int, id_: str) -> Arrays:
    """Return the arrays of `worker_file`.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    file = worker_file(path, rank, id_)
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: it belongs to {path}, which can't be loaded without it.")
    facts, arrays, identity_of_file = read(file)
    if identity_of_file != id_ or not isinstance(facts, WorkerFacts) or facts.rank != rank:
        raise CheckpointError(f"{file} is not the file that belongs to {path}: its content differs.")
    return arrays


def model_arrays(facts: ModelFacts, arrays: Arrays) -> Arrays:
    """Return the arrays of the model, "model/ENTRY", among those of a checkpoint.

    Raises:
        CheckpointError: one is missing, or has another shape than the facts say.

    Example:
        >>> model_arrays(WeightsFacts(naming="wire", reason="", tensors=()), {})
        {}
    """
    model = {}
    for tensor in facts.tensors:
        name = f"model/{tensor.name}"
        if name not in arrays:
            raise CheckpointError(f"the checkpoint has no {name!r}.")
        if arrays[name].shape != tensor.shape:
            raise CheckpointError(
                f"the checkpoint's {name!r} has shape {arrays[name].shape}, and its header lists {tensor.shape}."
            )
        model[name] = arrays[name]
    return model


def _agreed_on_files(comm: ScopedComm, make: Callable[[], tuple[T, Mapping[str, Any]]]) -> T:
    """Return the result of `agreed`; a system's error is one type on every worker, those without the file included."""

    return agreed(comm, lambda: with_own_type(make), {})


def with_own_type(make: Callable[[], T]) -> T:
    """Return the result of `make`; raise a system's error in it as a CheckpointFileError."""
    try:
        return make()
    except OSError as error:
        raised = CheckpointFileError(str(error))
        raised.errno = error.errno
        raise raised from error


def shared(all_sums: Sequence[Mapping[str, str]]) -> set[str]:
    """Return the names of the arrays that are equal on all workers.

    Args:
        all_sums: each worker's checksums by the arrays' names.
    """
    return {key for key, value in all_sums[0].items() if all(sums.get(key) == value for sums in all_sums)}


def write_own(worker: Collected, comm: ScopedComm, common: set[str]) -> str:
    """Write the arrays that differ between workers; return the file's identity, "" if there are none."""
    own = {key: value for key, value in worker.arrays.items() if key not in common}
    if not own:
        return ""
    facts = WorkerFacts(rank=comm.rank, workers=comm.size)
    id_ = identity(facts, {key: worker.sums[key] for key in own})
    write(worker_file(worker.path, comm.rank, id_), facts, own, worker.sums)
    return id_


def write_common(
    worker: Collected, comm: ScopedComm, all_sums: Sequence[Mapping[str, str]], ids: Sequence[str]
) -> None:
    """Write the file of rank 0, with which the checkpoint is whole. All other files are there.

    Args:
        worker: rank 0's.
        ids: results of `write_own`, by rank.

    Raises:
        CheckpointError: rank 0 does not see them.
        OSError: it can't be written.
    """
    files = {rank: worker_file(worker.path, rank, id_) for rank, id_ in enumerate(ids) if id_}
    unseen = [str(comm.ranks[rank]) for rank, file in files.items() if not file.is_file()]
    if unseen:
        raise CheckpointError(
            f"{worker.path.parent} is not one directory for all workers: rank {comm.ranks[0]} does not see the files "
            f"that ranks {', '.join(unseen)} have written there. Save to one that all of them see."
        )
    common = shared(all_sums)
    facts = {
        **worker.facts,
        "reason": worker.state.tensors.reason,
        "workers": comm.size,
        "files": {str(rank): id_ for rank, id_ in enumerate(ids) if id_},
        "per_worker": _per_worker(worker, all_sums, common),
    }
    # Workers of two frameworks are equal up to rounding: each has its own file, and rank 0's values serve all.
    names = common | {key for key in worker.arrays if worker.workers_equal and _equal_on_equal_workers(key)}
    arrays = {key: x for key, x in worker.arrays.items() if key in names}
    write(worker.path, parse(facts, TrainingFacts, "this training"), arrays, worker.sums)


def _equal_on_equal_workers(name: str) -> bool:
    """Return whether workers that hold the same state hold this array alike, whatever the inner optimizer keeps.

    Learning rates too: Keras rounds them to float32, and a script may give each worker its own.
    """
    return name.split("/")[0] in ("model", "anchor", "v", "average") or name in _RATES


def _per_worker(worker: Collected, all_sums: Sequence[Mapping[str, str]], common: set[str]) -> list[str]:
    """Return the kinds of arrays of each worker without which a job of another size would not be this one."""
    not_needed = {f"progress/{field}" for field in NOT_NEEDED}
    own = {key for sums in all_sums for key in sums if key not in common | not_needed}
    kinds = {
        key.split("/")[0]
        for key in own
        if not key.startswith("framework/") and not (worker.workers_equal and _equal_on_equal_workers(key))
    }
    kinds |= set() if at_rest(worker.state.progress) else {"push"}
    return [kind for kind in KINDS if kind in kinds]


def _mean_residuals(path: Path, facts: TrainingFacts) -> Arrays:
    """Return the mean of the workers' residuals, with which another number of workers owes as much."""
    sums: Arrays = {}
    for rank, id_ in facts.files.items():
        for name, value in read_worker(path, rank, id_).items():
            if name.startswith("residual/"):
                same = sums.setdefault(name, np.zeros_like(value))
                if (same.shape, same.dtype) != (value.shape, value.dtype):
                    raise CheckpointError(f"the workers' files of the checkpoint have {name!r} of different shapes.")
                sums[name] = same + value
    return {name: (value / facts.workers).astype(value.dtype) for name, value in sums.items()}
