"""What a build of Horovod depends on: the key of the wheel cache, and the record that travels with the wheel."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hvd_slowmo.installer import patches
from hvd_slowmo.installer.frameworks import Framework
from hvd_slowmo.installer.options import Options, passed_on
from hvd_slowmo.installer.sdist import Sdist

RECORD = "horovod/hvd_slowmo_build.json"
"""Where the record lies in the wheel and, installed, beside Horovod's own files."""


@dataclass(frozen=True)
class Recipe:
    """Everything that a built wheel depends on.

    Attributes:
        horovod: version of Horovod.
        sdist: hash of its sources.
        patches: hash of the changes to them.
        stall_check_mended: whether one of these mends the stall check.
        frameworks: full version of each framework it is built against.
        python: implementation, version and ABI of Python.
        platform: operating system, processor and C library.
        options: the settings of the build.
        environment: the variables of the user's environment that reach the compiler.
    """

    horovod: str
    sdist: str
    patches: str
    stall_check_mended: bool
    frameworks: Mapping[str, str]
    python: str
    platform: str
    options: Mapping[str, bool]
    environment: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the record as text; the same recipe gives the same text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @property
    def key(self) -> str:
        """Name of the recipe in the cache."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:20]


def recipe(
    sdist: Sdist,
    frameworks: tuple[Framework, ...],
    options: Options,
    env: Mapping[str, str],
    changes: tuple[patches.Patch, ...] = patches.PATCHES,
) -> Recipe:
    """Return the recipe for building `sdist` in the running environment."""
    return Recipe(
        horovod=sdist.version,
        sdist=sdist.sha256,
        patches=patches.digest(changes),
        stall_check_mended=patches.STALL_CHECK in changes,
        frameworks={framework.name: framework.version for framework in frameworks},
        python=_python(),
        platform=_platform(),
        options=options.identity(),
        environment=passed_on(env),
    )


def read(text: str) -> Recipe | None:
    """Return the recipe that a record holds, None if it is not one of this version's records."""
    try:
        fields = json.loads(text)
        return Recipe(**fields)
    except (ValueError, TypeError):
        return None


def installed() -> Recipe | None:
    """Return the recipe of the installed Horovod, None where it has none (another's build) or there is no Horovod."""
    try:
        distribution = importlib.metadata.distribution("horovod")
        return read(Path(str(distribution.locate_file(RECORD))).read_text(encoding="utf-8"))
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None


def _python() -> str:
    return f"{sys.implementation.cache_tag} {sysconfig.get_config_var('SOABI') or ''}".strip()


def _platform() -> str:
    return " ".join([sysconfig.get_platform(), *platform.libc_ver()]).strip()
