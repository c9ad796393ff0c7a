"""The user's cache of built wheels: whole files or none, one builder at a time."""

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
    """Folders under one root.

    Attributes:
        root: usually `~/.cache/hvd-slowmo`; see `user_cache`.
    """

    root: Path

    @property
    def sdists(self) -> Path:
        """Where source archives are kept."""
        return self.root / "sdist"

    def log(self, name: str) -> Path:
        """Return the file for a log; logs are kept."""
        return self.root / "logs" / f"{name}.log"

    def find(self, recipe: Recipe) -> Path | None:
        """Return the wheel built by `recipe`, None if there is no whole one."""
        for wheel in sorted(self._folder(recipe).glob("*.whl")):
            if is_whole(wheel, recipe):
                return wheel
        return None

    def put(self, recipe: Recipe, wheel: Path) -> Path:
        """Keep a wheel and return its place; others see it whole or not at all."""
        folder = self._folder(recipe)
        folder.mkdir(parents=True, exist_ok=True)
        incoming = folder / f".incoming-{os.getpid()}"
        shutil.copyfile(wheel, incoming)
        return incoming.replace(folder / wheel.name)

    @contextlib.contextmanager
    def building(self, recipe: Recipe, reporter: Reporter) -> Iterator[Path]:
        """Give an empty folder to build in, to one process at a time; it is removed at the end.

        A second process that wants the same wheel waits, and should look for it again once it has the folder.
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
    """Return the cache of the user: in $XDG_CACHE_HOME, or else in ~/.cache."""
    base = env.get("XDG_CACHE_HOME", "")
    # The specification tells programs to ignore a relative path.
    folder = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    return Cache(folder / "hvd-slowmo")


def is_whole(wheel: Path, recipe: Recipe) -> bool:
    """Return whether a wheel is readable to its end, was built by `recipe`, and has each framework's library."""
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
            reporter.say("Another process builds the same Horovod; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file, also by the process's death, gives the lock back
