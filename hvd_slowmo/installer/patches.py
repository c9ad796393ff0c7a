"""Text replacements in Horovod's sources; `repairs` holds the replacements themselves."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from hvd_slowmo.installer.errors import InstallError

_FIX = "upgrade hvd-slowmo; this version does not support these sources."


@dataclass(frozen=True)
class Patch:
    """One replacement in one file.

    Attributes:
        path: the file, relative to the root of the sources.
        before: the text to replace; it must occur exactly once.
        after: the replacement.
        reason: reason for the patch.
    """

    path: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True)
class Repair:
    """Patches that together give Horovod a property which it lacks.

    Attributes:
        name: name, which the record of the build and `hvd-slowmo doctor` show.
        without: consequence of its absence.
        patches: the patches.
    """

    name: str
    without: str
    patches: tuple[Patch, ...]


def digest(patches: tuple[Patch, ...]) -> str:
    """Return a SHA-256 hash of the patches in hexadecimal, without their reasons."""
    sha = hashlib.sha256()
    for patch in patches:
        for part in (patch.path, patch.before, patch.after):
            sha.update(part.encode() + b"\0")
    return sha.hexdigest()


def apply(root: Path, patches: tuple[Patch, ...]) -> None:
    """Apply `patches` to the sources under `root`.

    Raises:
        InstallError: a file is missing, or does not contain the text to replace exactly once. No file is changed in
            this case, because all patches are tried before the first write.
    """
    texts: dict[Path, str] = {}
    for patch in patches:
        path = root / patch.path
        if path not in texts:
            texts[path] = _read(path, patch)
        count = texts[path].count(patch.before)
        if count != 1:
            raise InstallError(
                f"Horovod's {patch.path} holds {patch.before!r}, the text to replace, {count} times instead of once.",
                _FIX,
            )
        texts[path] = texts[path].replace(patch.before, patch.after)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


def _read(path: Path, patch: Patch) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InstallError(
            f"Horovod's sources have no readable {patch.path}, which must be patched ({patch.reason}): {error}.",
            _FIX,
        ) from error
