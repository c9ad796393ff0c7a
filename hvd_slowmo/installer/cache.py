"""The user's cache of built wheels: it holds complete files only, and one process builds at a time."""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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

    def find(self, recipe: Recipe) -> Path | None:
        """Return the path of the wheel built from `recipe`, or None if the cache has no complete one."""
        for wheel in sorted(self._folder(recipe).glob("*.whl")):
            if is_whole(wheel, recipe):
                return wheel
        return None

    def put(self, recipe: Recipe, wheel: Path) -> Path:
        """Copy a wheel into the cache and return its new path; the copy appears atomically.

        Raises:
            OSError: the wheel cannot be read, or the cache cannot be written.
        """
        folder = self._folder(recipe)
        folder.mkdir(parents=True, exist_ok=True)
        incoming = folder / f".incoming-{os.getpid()}"
        shutil.copyfile(wheel, incoming)
        return incoming.replace(folder / wheel.name)

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
