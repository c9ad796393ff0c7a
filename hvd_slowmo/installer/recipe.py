"""Inputs of a build of Horovod: the key of the wheel cache, and the record inside the wheel."""

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

from hvd_slowmo.installer import patches, repairs
from hvd_slowmo.installer.frameworks import Framework
from hvd_slowmo.installer.options import Options, passed_on
from hvd_slowmo.installer.sdist import Sdist

RECORD = "horovod/hvd_slowmo_build.json"
"""Path of the record in the wheel and, once installed, among Horovod's files."""


@dataclass(frozen=True)
class Recipe:
    """Inputs of a build; together they determine the wheel.

    Attributes:
        horovod: version of Horovod.
        sdist: SHA-256 hash of the source archive.
        patches: SHA-256 hash of the patches.
        repairs: names of the repairs that the patches contain.
        frameworks: full version of each framework, by import name.
        python: implementation, version and ABI of Python.
        platform: operating system, processor and C library.
        options: settings of the build, by name.
        environment: the user's environment variables that reach the compiler.
    """

    horovod: str
    sdist: str
    patches: str
    repairs: tuple[str, ...]
    frameworks: Mapping[str, str]
    python: str
    platform: str
    options: Mapping[str, bool]
    environment: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the record as JSON; equal recipes give equal text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @property
    def key(self) -> str:
        """Return the recipe's name in the cache: 20 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:20]


def recipe(
    sdist: Sdist,
    frameworks: tuple[Framework, ...],
    options: Options,
    env: Mapping[str, str],
    changes: tuple[patches.Patch, ...] = repairs.PATCHES,
) -> Recipe:
    """Return the recipe for building `sdist` in the running environment.

    Args:
        sdist: the source distribution.
        frameworks: the frameworks to build for.
        options: settings of the build.
        env: the user's environment variables.
        changes: patches to apply to the sources.
    """
    return Recipe(
        horovod=sdist.version,
        sdist=sdist.sha256,
        patches=patches.digest(changes),
        repairs=repairs.included(changes),
        frameworks={framework.name: framework.version for framework in frameworks},
        python=_python(),
        platform=_platform(),
        options=options.identity(),
        environment=passed_on(env),
    )


def read(text: str) -> Recipe | None:
    """Return the recipe in a record, or None if `text` is not a record of this version."""
    try:
        fields = json.loads(text)
        return Recipe(**{**fields, "repairs": tuple(fields["repairs"])})
    except (KeyError, ValueError, TypeError):
        return None


def installed() -> Recipe | None:
    """Return the recipe of the installed Horovod, or None if Horovod is absent or was not built by hvd-slowmo."""
    try:
        distribution = importlib.metadata.distribution("horovod")
        return read(Path(str(distribution.locate_file(RECORD))).read_text(encoding="utf-8"))
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None


def _python() -> str:
    return f"{sys.implementation.cache_tag} {sysconfig.get_config_var('SOABI') or ''}".strip()


def _platform() -> str:
    return " ".join([sysconfig.get_platform(), *platform.libc_ver()]).strip()
