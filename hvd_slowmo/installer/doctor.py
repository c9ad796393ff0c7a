"""`hvd-slowmo doctor`: what is installed, what Horovod was built with and for, and whether one could train."""

from __future__ import annotations

import enum
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvd_slowmo.installer import check, patches, preflight, recipe
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.frameworks import MINIMUM, Framework, detect, package_folder
from hvd_slowmo.version import __version__

_INSTALL = "run `hvd-slowmo install-horovod`."


class Level(enum.Enum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor saw.

    Attributes:
        level: how bad it is; a problem keeps a user from training.
        text: what it is.
        cure: what to do about it, "" where nothing need be done.
    """

    level: Level
    text: str
    cure: str = ""


def examine(env: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the findings, one by one as they are made; the last ones start workers and take some seconds."""
    yield Finding(Level.OK, f"hvd-slowmo {__version__}, Python {platform.python_version()} ({sys.executable})")
    frameworks = detect()
    yield from _frameworks(frameworks)
    yield _compiler(env, max((framework.cxx for framework in frameworks), default=17))
    try:
        version = importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        yield Finding(Level.PROBLEM, "Horovod is not installed", _INSTALL)
        return
    built = recipe.installed()
    yield _origin(version, built)
    yield _launcher(env)
    usable = [framework for framework in frameworks if framework.supported]
    targets = dict(built.frameworks) if built is not None else _foreign_targets()
    works: list[Framework] = []
    for framework in usable:
        finding, result = _allreduce(framework, targets)
        yield from _match(framework, targets)
        yield finding
        if result.error is None:
            if not works:
                yield _operations(result.facts, frameworks)
            works.append(framework)
    if works:
        yield _stall_check(works[0], built)


def _frameworks(found: tuple[Framework, ...]) -> Iterator[Finding]:
    if not found:
        yield Finding(
            Level.PROBLEM,
            "Neither PyTorch nor TensorFlow is installed",
            "install one, for instance with `pip install torch` or `pip install tensorflow`, then " + _INSTALL,
        )
    for framework in found:
        title = f"{framework.title} {framework.version}, built {'with' if framework.cuda else 'without'} CUDA"
        if framework.supported:
            yield Finding(Level.OK, title)
        else:
            wanted = ".".join(map(str, MINIMUM[framework.name]))
            others = any(other.supported for other in found)
            level = Level.WARNING if others else Level.PROBLEM
            yield Finding(level, f"{title}: too old", f"update it to {wanted} or newer, then {_INSTALL}")
    if package_folder("keras") is not None:
        try:
            yield Finding(Level.OK, f"Keras {importlib.metadata.version('keras')}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding(Level.NOTE, "Keras, of an unknown version")


def _compiler(env: Mapping[str, str], standard: int) -> Finding:
    try:
        compiler = preflight.require_compiler(env, standard)
    except InstallError as error:
        return Finding(Level.NOTE, f"{error.cause} It is needed only to build Horovod anew.", error.cure)
    result = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return Finding(Level.OK, f"C++ compiler {compiler}: {(result.stdout.splitlines() or ['unknown version'])[0]}")


def _origin(version: str, built: recipe.Recipe | None) -> Finding:
    if built is None:
        return Finding(Level.NOTE, f"Horovod {version}, not built by this hvd-slowmo: it has no record of how")
    targets = ", ".join(f"{name} {target}" for name, target in built.frameworks.items())
    if built.patches != patches.digest():
        return Finding(
            Level.NOTE, f"Horovod {version}, built for {targets} with the patches of another hvd-slowmo", _INSTALL
        )
    return Finding(Level.OK, f"Horovod {version}, built for {targets} with this hvd-slowmo's patches")


def _launcher(env: Mapping[str, str]) -> Finding:
    places = os.pathsep.join([env.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    found = shutil.which("horovodrun", path=places)
    if found is None:
        return Finding(Level.PROBLEM, "The command horovodrun is missing, which starts the workers", _INSTALL)
    return Finding(Level.OK, f"horovodrun: {found}")


def _foreign_targets() -> dict[str, str]:
    # Horovod's own build writes the frameworks' versions into this file.
    try:
        path = Path(str(importlib.metadata.distribution("horovod").locate_file("horovod/metadata.json")))
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    names = {"pytorch": "torch", "tensorflow": "tensorflow"}
    return {names[name]: str(version) for name, version in metadata.items() if name in names}


def _match(framework: Framework, targets: Mapping[str, str]) -> Iterator[Finding]:
    target = targets.get(framework.name)
    if target is not None and target != framework.version:
        yield Finding(
            Level.WARNING,
            f"Horovod was built for {framework.title} {target}, and {framework.version} is installed: they may crash",
            _INSTALL,
        )


def _allreduce(framework: Framework, targets: Mapping[str, str]) -> tuple[Finding, check.Result]:
    result = check.allreduce(framework.name)
    if result.error is None:
        return Finding(Level.OK, f"Two workers summed a tensor with {framework.title} ({result.seconds:.1f} s)"), result
    if framework.name not in targets:
        text = f"Horovod was built without {framework.title}"
        cure = "run `hvd-slowmo install-horovod`: it builds for every framework that is installed."
        return Finding(Level.PROBLEM, text, cure), result
    text = f"Two workers could not sum a tensor with {framework.title}: {result.error}"
    cure = (
        "run `hvd-slowmo install-horovod --rebuild`; if it fails again, see that processes here can connect to "
        "each other on 127.0.0.1."
    )
    return Finding(Level.PROBLEM, text, cure), result


def _operations(facts: Mapping[str, bool], frameworks: tuple[Framework, ...]) -> Finding:
    have = [name for name in ("gloo", "mpi", "nccl") if facts.get(name)]
    text = "Horovod's operations: " + (", ".join(have) or "none")
    if not facts.get("nccl") and any(framework.cuda for framework in frameworks):
        cure = "for GPU training over NCCL run `hvd-slowmo install-horovod --nccl`; it needs the CUDA toolkit."
        return Finding(Level.NOTE, text + "; of GPU tensors PyTorch's are refused, TensorFlow's copied", cure)
    return Finding(Level.OK, text)


def _stall_check(framework: Framework, built: recipe.Recipe | None) -> Finding:
    if built is not None and built.stall_check_mended:
        return Finding(Level.OK, "The stall check works: Horovod was built with it mended")
    result = check.stall(framework.name)
    if result.error is None:
        return Finding(
            Level.OK, f"The stall check works: a tensor that never came was reported ({result.seconds:.1f} s)"
        )
    return Finding(
        Level.WARNING,
        "The stall check does not work: a worker that waits for ever is not reported, whatever HOROVOD_STALL_* say",
        _INSTALL,
    )
