"""A directory of checkpoints of one job, named by their steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hvd_slowmo.checkpoint.file import Arrays
from hvd_slowmo.checkpoint.job import EXTRA, read_checkpoint
from hvd_slowmo.checkpoint.leftovers import remove_leftovers, writing
from hvd_slowmo.checkpoint.paths import common_file
from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core.start.handshake import agreed, logger
from hvd_slowmo.errors import CheckpointError

_NAME = r"step-(\d{9,})\.slowmo"


class Found(NamedTuple):
    """A whole checkpoint."""

    path: Path
    step: int
    extra: Arrays  # the arrays that `load` leaves out, by the rest of their names
    workers: int  # number of workers that saved it


class Series:
    """Checkpoints in a directory, the newest of which are kept.

    Args:
        folder: the directory.
        keep: number of checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint at a step.

        Example:
            >>> Series(Path("runs"), keep=3).path(1000).name
            'step-000001000.slowmo'
        """
        return self.folder / f"step-{step:09d}.slowmo"

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints whose common file is there, the newest first."""
        matches = [re.fullmatch(_NAME, file.name) for file in self.folder.iterdir()]
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def remove_older(self) -> None:
        """Remove all but the newest checkpoints, and unfinished files. Only where no worker is writing a file."""
        self._remove(self._keep)

    def remove_unfinished(self) -> None:
        """Remove the files of saves that were killed. Only where no worker is writing a file."""
        self._remove(None)

    def _remove(self, keep: int | None) -> None:
        with suppress(OSError):  # a directory that can't be listed: it does no harm
            kept = set(self.steps()[:keep])
            for path in {common_file(file) or file for file in self.folder.iterdir()}:
                match = re.fullmatch(_NAME, path.name)
                if match is None:
                    continue
                with suppress(CheckpointError), writing(path):
                    if int(match[1]) not in kept:
                        path.unlink(missing_ok=True)
                    remove_leftovers(path)  # without the common file, all others are

    def find(self, comm: ScopedComm, settings: Mapping[str, object]) -> Found | None:
        """Return the newest checkpoint that is whole, None in a directory without any. A collective.

        Args:
            comm: the workers.
            settings: that must be equal on all workers, in JSON types.

        Raises:
            CheckpointError: on every worker, if there are checkpoints and none of them is whole.
            ValueError: on every worker, if a directory or a setting differs.
        """

        def listed() -> tuple[list[int], Mapping[str, object]]:
            if comm.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.remove_unfinished()  # an older checkpoint may still be needed, if the newest is damaged
            return self.steps() if comm.rank == 0 else [], {"folder": str(self.folder), **settings}

        # One worker's view decides: on a network file system another may not have the newest names yet.
        steps: list[int] = comm.gather("steps", agreed(comm, listed, {}))[0]
        damaged = []
        for step in steps:
            path = self.path(step)
            found, error = _tried(partial(_read, path, step, comm))
            errors = comm.gather("errors", error)
            texts = [f"rank {rank}: {text}" for rank, text in zip(comm.ranks, errors, strict=True) if text]
            if not texts:
                return found
            damaged.append(texts[0])
            if comm.rank == 0:
                logger.warning("%s: %s is left out, since it can't be read whole: %s", comm.name, path, texts[0])
        if damaged:
            raise CheckpointError(
                f"{comm.name}: no checkpoint in {self.folder} is whole; {damaged[0]} To begin anew, give another "
                "directory."
            )
        return None


def _read(path: Path, step: int, comm: ScopedComm) -> Found:
    """Read all that this worker needs of a checkpoint, so that every byte is checked."""
    contents = read_checkpoint(path, comm.rank, comm.size)
    arrays = {**contents.common, **contents.own}
    extra = {name.removeprefix(EXTRA): x for name, x in arrays.items() if name.startswith(EXTRA)}
    return Found(path, step, extra, contents.facts.workers)


def _tried(work: Callable[[], Found]) -> tuple[Found | None, str]:
    try:
        return work(), ""
    except (CheckpointError, OSError) as error:
        return None, str(error)
