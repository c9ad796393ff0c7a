"""A save that is under way beside the training.

The state is copied at once. Three parts follow in a thread: checksums; the files of single workers; the file of rank 0,
with which the checkpoint is whole. No thread starts a collective: the workers tell each other that a part is done where
they come together anyway, and only then begin the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hvd_slowmo.checkpoint.file import Arrays, checksum
from hvd_slowmo.checkpoint.job import (
    Collected,
    shared,
    with_own_type,
    write_common,
    write_own,
)
from hvd_slowmo.checkpoint.leftovers import remove_leftovers, writing
from hvd_slowmo.checkpoint.paths import worker_file
from hvd_slowmo.checkpoint.state import WorkerState, collect, facts_of
from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.errors import SharedError, raise_together, share


class _Answer(NamedTuple):
    """One worker's answer to the others: whether its part is done."""

    done: bool
    result: Any = None
    error: SharedError | None = None


class Saving:
    """One worker's part of a save. Every worker makes one at the same step.

    Args:
        comm: the workers.
        path: of the common file.
        make: returns this worker's state.
        extra: arrays beside it.
        finished: called in rank 0's thread once the checkpoint is whole.
    """

    def __init__(
        self,
        comm: ScopedComm,
        path: Path,
        make: Callable[[], WorkerState],
        extra: Callable[[], Arrays],
        finished: Callable[[], None],
    ) -> None:
        self._comm, self._path, self._finished = comm, path, finished
        self._worker: Collected | None = None
        self._all_sums: list[Mapping[str, str]] = []
        self._files: list[str] = []
        self._next: Callable[[list[Any]], bool] = self._go_on_with_files
        self._part: Future[Any] = Future()
        try:
            state = make()
            # The thread must not read what training changes; some arrays are in the tensors' own memory.
            arrays = {name: np.array(x, order="C") for name, x in {**collect(state), **extra()}.items()}
            self._worker = Collected(path, state, facts_of(state), arrays, {})
        except Exception as error:  # whatever it is, the other workers will wait for this one's files
            self._part.set_exception(error)
        else:
            self._part = _in_background(self._checksums)

    def advance(self, *, wait: bool = False) -> bool:
        """Begin the next part, if all workers have done theirs. A collective.

        Args:
            wait: for this worker's part; the same on all workers.

        Returns:
            Whether the checkpoint is whole.

        Raises:
            CheckpointFileError: on every worker, if the system refused a file on one.
            ValueError: on every worker, if something can't be saved on one.
        """
        if wait:
            self._part.exception()
        own = self._part.exception() if self._part.done() else None
        assert own is None or isinstance(own, Exception), "nothing else ends a part"
        answers = self._comm.scoped("saving").gather("part", self._answer(own))
        errors = [(rank, a.error) for rank, a in zip(self._comm.ranks, answers, strict=True) if a.error is not None]
        raise_together(self._comm.name, errors, self._comm.size, own)
        if not all(answer.done for answer in answers):
            return False
        return self._next([answer.result for answer in answers])

    def finish(self) -> None:
        """Wait until the checkpoint is whole. A collective; raises as `advance`."""
        while not self.advance(wait=True):
            pass

    def _answer(self, error: Exception | None) -> _Answer:
        if error is not None:
            return _Answer(True, error=share(error))
        return _Answer(True, self._part.result()) if self._part.done() else _Answer(False)

    def _checksums(self) -> dict[str, str]:
        worker = self._collected
        sums = {name: checksum(array) for name, array in worker.arrays.items()}
        self._worker = replace(worker, sums=sums)
        return sums

    def _go_on_with_files(self, all_sums: list[Any]) -> bool:
        self._all_sums, common = all_sums, shared(all_sums)
        if all(sums.keys() <= common for sums in all_sums):
            return self._go_on_with_common_file([""] * len(all_sums))
        self._next = self._go_on_with_common_file
        self._part = _in_background(lambda: write_own(self._collected, self._comm, common))
        return False

    def _go_on_with_common_file(self, files: list[Any]) -> bool:
        self._files, self._next = files, lambda _: True
        self._part = _in_background(self._complete)
        return False

    def _complete(self) -> None:
        if self._comm.rank == 0:
            with writing(self._path):
                write_common(self._collected, self._comm, self._all_sums, self._files)
                listed = {worker_file(self._path, rank, id_) for rank, id_ in enumerate(self._files)}
                remove_leftovers(self._path, listed)
            self._finished()

    @property
    def _collected(self) -> Collected:
        assert self._worker is not None, "else the first part has failed"
        return self._worker


def _in_background(work: Callable[[], Any]) -> Future[Any]:
    """Return the future result of `work`, which runs in a thread."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(with_own_type(work))
        except Exception as error:  # it belongs to the training, which asks for it
            future.set_exception(error)

    # A daemon: a process that ends has lost the others, without whom the save can't become whole.
    threading.Thread(target=run, name="hvd_slowmo.checkpoint", daemon=True).start()
    return future
