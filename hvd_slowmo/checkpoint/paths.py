"""Paths of the files beside a checkpoint's common file, and patterns that find them again."""

from __future__ import annotations

import os
import re
from pathlib import Path

_WORKER = r"\.rank\d+-[0-9a-f]{16}"
_TEMPORARY = r"\.\d+\.slowmo-tmp"
_LOCK = r"\.slowmo-lock"


def worker_file(path: Path, rank: int, id_: str) -> Path:
    """Return the path of a worker's own part of the checkpoint at `path`.

    Args:
        id_: its identity, which the common file lists.

    Example:
        >>> worker_file(Path("training.slowmo"), 3, "5e1f0c2a9b7d4e68" + "0" * 16).name
        'training.slowmo.rank3-5e1f0c2a9b7d4e68'
    """
    return path.with_name(f"{path.name}.rank{rank}-{id_[:16]}")


def temporary_directory(path: Path) -> Path:
    """Return the directory in which this process writes a file before it takes its place.

    Example:
        >>> temporary_directory(Path("job")).name == f".job.{os.getpid()}.slowmo-tmp"
        True
    """
    return path.with_name(f".{path.name}.{os.getpid()}.slowmo-tmp")


def lock_file(path: Path) -> Path:
    """Return the file that is locked while `path` is written.

    Example:
        >>> lock_file(Path("job")).name
        '.job.slowmo-lock'
    """
    return path.with_name(f".{path.name}.slowmo-lock")


def is_worker_file(file: Path, path: Path) -> bool:
    """Return whether a file has the name of a worker's part of `path`.

    Example:
        >>> is_worker_file(Path("job.rank3-5e1f0c2a9b7d4e68"), Path("job"))
        True
    """
    return re.fullmatch(re.escape(path.name) + _WORKER, file.name) is not None


def is_temporary(file: Path, path: Path) -> bool:
    """Return whether a directory has the name of a temporary one, of `path` or of a worker's part of it.

    Example:
        >>> is_temporary(temporary_directory(Path("job")), Path("job"))
        True
    """
    return re.fullmatch(rf"\.{re.escape(path.name)}({_WORKER})?{_TEMPORARY}", file.name) is not None


def common_file(file: Path) -> Path | None:
    """Return the path of the common file beside which a file lies; None for a file that is none of ours.

    Example:
        >>> common_file(Path(".job.rank3-5e1f0c2a9b7d4e68.71.slowmo-tmp"))
        PosixPath('job')
    """
    hidden = re.fullmatch(rf"\.(.+?)(?:{_WORKER})?(?:{_TEMPORARY}|{_LOCK})", file.name)
    found = hidden or re.fullmatch(rf"(.+){_WORKER}", file.name)
    return None if found is None else file.with_name(found.group(1))
