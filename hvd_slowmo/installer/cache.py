"""The user's cache of built wheels: it holds complete files only, and one process builds at a time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.recipe import RECORD, Recipe
from hvd_slowmo.installer.reporter import Reporter


@dataclass(frozen=True)
class Cache:
    """Cache of source archives, wheels and logs.

    Attributes:
        root: directory of the cache, usually `~/.cache/hvd-slowmo`; see `user_cache`.
    """

    root: Path

    @property
    def sdists(self) -> Path:
        """Return the directory of the source archives."""
        return self.root / "sdist"

    def log(self, name: str) -> Path:
        """Return the path of the log `name`; logs are kept."""
        return self.root / "logs" / f"{name}.log"

    def make_private(self) -> None:
        """Create the cache for this account alone, or check that an existing one is nobody else's.

        Code from the cache is installed, so whoever can write to it could run code as this account.

        Raises:
            InstallError: another account owns the cache, or may write to it.
            OSError: it cannot be created.
        """
        self.root.parent.mkdir(parents=True, exist_ok=True)
        self.root.mkdir(mode=0o700, exist_ok=True)
        found = self.root.lstat()
        if stat.S_ISDIR(found.st_mode) and _is_own(found):
            self.root.chmod(0o700)
            return
        mode = f"owner {found.st_uid}, {stat.filemode(found.st_mode)}"
        raise InstallError(
            f"{self.root} must be a directory to which the account {os.geteuid()} alone may write. Received: {mode}.",
            f"remove it, or `chmod go-w {self.root}` if it is yours; or set XDG_CACHE_HOME to another directory.",
        )

    def find(self, recipe: Recipe) -> Path | None:
        """Return the path of the wheel built from `recipe`, or None if the cache has no complete one.

        Its hash has been compared with the one that `put` has noted.
        """
        for wheel in sorted(self._folder(recipe).glob("*.whl")):
            if _has_noted_hash(wheel) and is_whole(wheel, recipe):
                return wheel
        return None

    def put(self, recipe: Recipe, wheel: Path) -> Path:
        """Copy a wheel into the cache and return its new path; the copy appears atomically.

        Raises:
            OSError: the wheel cannot be read, or the cache cannot be written.
        """
        folder = self._folder(recipe)
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / wheel.name
        _write(_hash_file(kept), hash_of(wheel).encode())
        _write(kept, wheel.read_bytes())
        return kept

    @contextlib.contextmanager
    def building(self, recipe: Recipe, reporter: Reporter) -> Iterator[Path]:
        """Create an empty build directory for one process at a time, and remove it on exit.

        A second process that needs the same wheel waits. It should call `find` again as soon as it has the directory.

        Raises:
            OSError: the cache cannot be written.
        """
        folder = self.root / "build" / recipe.key
        with _locked(self.root / "locks" / recipe.key, reporter):
            shutil.rmtree(folder, ignore_errors=True)  # left by a build that was killed
            folder.mkdir(parents=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, recipe: Recipe) -> Path:
        return self.root / "wheels" / recipe.key


def user_cache(env: Mapping[str, str]) -> Cache:
    """Return the user's cache, below $XDG_CACHE_HOME if that is an absolute path and below ~/.cache otherwise."""
    base = env.get("XDG_CACHE_HOME", "")
    # The XDG specification requires that programs ignore a relative path.
    folder = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return Cache(folder / "hvd-slowmo")


def hash_of(file: Path) -> str:
    """Return the SHA-256 hash of a file in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _hash_file(wheel: Path) -> Path:
    return wheel.with_name(f"{wheel.name}.sha256")


def _is_own(found: os.stat_result) -> bool:
    """Return whether this account owns a file, and no other may write to it."""
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _has_noted_hash(wheel: Path) -> bool:
    try:
        if not _is_own(wheel.lstat()) or not _is_own(_hash_file(wheel).lstat()):
            return False
        return hash_of(wheel) == _hash_file(wheel).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _write(path: Path, data: bytes) -> None:
    """Put a private file in the place of `path`, atomically."""
    incoming = path.with_name(f".{path.name}.{os.getpid()}")
    incoming.unlink(missing_ok=True)
    with open(os.open(incoming, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(data)
    incoming.replace(path)


def is_whole(wheel: Path, recipe: Recipe) -> bool:
    """Return True if `wheel` is undamaged, was built from `recipe` and contains the library of each framework."""
    libraries = {"torch": "horovod/torch/mpi_lib_v2", "tensorflow": "horovod/tensorflow/mpi_lib"}
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            return (
                RECORD in names
                and archive.read(RECORD).decode() == recipe.to_json()
                and all(any(name.startswith(f"{libraries[f]}.") for name in names) for f in recipe.frameworks)
                and archive.testzip() is None
            )
    except (OSError, zipfile.BadZipFile):
        return False


@contextlib.contextmanager
def _locked(path: Path, reporter: Reporter) -> Iterator[None]:
    import fcntl  # not on Windows, where Horovod does not run either

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.say("Another process is building the same Horovod; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, also when the process is killed
