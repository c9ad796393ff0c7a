"""Files that killed saves have left, and the lock by which a running save keeps its own.

A save holds the lock as long as it runs, and the system releases the lock of a process that is killed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hvd_slowmo.checkpoint.facts import WorkerFacts
from hvd_slowmo.checkpoint.file import read_facts
from hvd_slowmo.checkpoint.paths import common_file, is_temporary, is_worker_file, lock_file, worker_file
from hvd_slowmo.errors import CheckpointError


@contextmanager
def writing(path: Path) -> Iterator[bool]:
    """Hold the lock of a file within a `with` block, in which it is written.

    Yields:
        False where the directory takes no lock: on file systems without locks, or without the right to write there.

    Raises:
        CheckpointError: another process holds it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory, writing(Path(directory) / "job") as locked:
        ...     sorted(os.listdir(directory))
        ['.job.slowmo-lock']
    """
    import fcntl  # not on Windows, where nothing but `inspect` and `convert` runs

    descriptor = _locked(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            lock_file(path).unlink(missing_ok=True)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may hold the same file open
            os.close(descriptor)


def _locked(path: Path) -> int | None:
    import fcntl

    lock = lock_file(path)
    while True:
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
        except OSError:  # the save itself says what it may not do
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(
                f"{path} is being written by another process, which holds {lock.name}. Wait for it, or save elsewhere."
            ) from None
        except FileNotFoundError:  # its last holder has removed it
            pass
        except OSError:  # a file system without locks
            os.close(descriptor)
            lock.unlink(missing_ok=True)
            return None
        os.close(descriptor)


def remove_leftovers(path: Path, listed: Collection[Path] | None = None) -> list[Path]:
    """Remove the files that earlier saves of a checkpoint have left. Call it within `writing(path)`.

    Args:
        path: of the common file, which need not exist.
        listed: workers' files that belong to the checkpoint; None for those that its common file lists.

    Returns:
        The files and directories that are gone. A damaged common file does not say which workers' files belong to it,
        and they are kept then.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     job = Path(directory) / "job"
        ...     (Path(directory) / ".job.71.slowmo-tmp").mkdir()
        ...     [file.name for file in remove_leftovers(job)]
        ['.job.71.slowmo-tmp']
    """
    if listed is None:
        listed = _listed(path)
    removed = []
    for file in _files(path.parent):
        unlisted = listed is not None and is_worker_file(file, path) and file not in listed
        if unlisted or is_temporary(file, path):
            with suppress(OSError):  # it does no harm
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
                removed.append(file)
    return removed


def clean(path: Path) -> list[Path]:
    """Remove the files that killed saves have left: those of one checkpoint, or of all in a directory.

    Files of a running save are kept.

    Args:
        path: of a checkpoint's common file, which need not exist, or of a directory.

    Returns:
        The files and directories that are gone.

    Raises:
        CheckpointError: the checkpoint at `path` is being written, or its file system has no locks, so that nobody can
            tell.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     (Path(directory) / "job.rank3-5e1f0c2a9b7d4e68").touch()
        ...     [file.name for file in clean(Path(directory))]
        ['job.rank3-5e1f0c2a9b7d4e68']
    """
    if path.is_dir():
        removed = []
        for common in sorted({common for file in _files(path) if (common := common_file(file)) is not None}):
            with suppress(CheckpointError):
                removed += clean(common)
        return removed
    with writing(path) as locked:
        if not locked:
            raise CheckpointError(
                f"{path.parent} takes no locks, so a running save can't be told from a killed one. Remove the files "
                f"by hand once no job writes there: .{path.name}*.slowmo-tmp."
            )
        return remove_leftovers(path)


def _listed(path: Path) -> set[Path] | None:
    """Return the workers' files of a checkpoint, none where there is no checkpoint; None if it can't be read."""
    if not path.exists():
        return set()
    try:
        facts, _, _ = read_facts(path)
    except (CheckpointError, OSError):
        return None
    return set() if isinstance(facts, WorkerFacts) else {worker_file(path, *item) for item in facts.files.items()}


def _files(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:  # a directory that can't be listed: a checkpoint there is complete all the same
        return []
