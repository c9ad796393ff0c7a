"""`hvd-slowmo doctor`: examine the frameworks, and the ability of both transports to train."""

from __future__ import annotations

import enum
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvd_slowmo.installer import check, patches, preflight, recipe, repairs
from hvd_slowmo.installer.elastic_repair import ELASTIC_RECOVERY
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.frameworks import MINIMUM, Framework, detect, package_folder
from hvd_slowmo.installer.launcher_repair import LAUNCHER
from hvd_slowmo.installer.patches import Repair
from hvd_slowmo.installer.services_repair import SIGNED_SERVICES
from hvd_slowmo.version import __version__

_INSTALL = "run `hvd-slowmo install-horovod`."


class Level(enum.Enum):
    """Severity of a finding."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One observation of the doctor.

    Attributes:
        level: severity; a problem prevents training.
        text: description.
        fix: action for the user, or "" if none is needed.
    """

    level: Level
    text: str
    fix: str = ""


def examine(env: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the findings one by one, as soon as each is known.

    The last ones start workers and take several seconds.

    Args:
        env: the user's environment variables.
    """
    yield Finding(Level.OK, f"hvd-slowmo {__version__}, Python {platform.python_version()} ({sys.executable})")
    frameworks = detect()
    yield from _frameworks(frameworks)
    distributed = _distributed(frameworks)
    if distributed is not None:
        yield distributed
    yield _compiler(env, max((framework.cxx for framework in frameworks), default=17))
    try:
        version = importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        if distributed is not None and distributed.level is Level.OK:
            text = "Horovod is not installed. Keras and jobs of both frameworks need it; PyTorch runs under torchrun"
            yield Finding(Level.NOTE, text, f"for these, {_INSTALL}")
        else:
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
        yield from _repairs(works[0], built)


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
            yield Finding(level, f"{title}: too old", f"upgrade to {wanted} or newer, then {_INSTALL}")
    if package_folder("keras") is not None:
        try:
            yield Finding(Level.OK, f"Keras {importlib.metadata.version('keras')}")
        except importlib.metadata.PackageNotFoundError:
            yield Finding(Level.NOTE, "Keras, version unknown")


def _distributed(found: tuple[Framework, ...]) -> Finding | None:
    if not any(framework.name == "torch" and framework.supported for framework in found):
        return None
    result = check.allreduce("torch.distributed")
    if result.error is not None:
        text = f"Two workers could not sum a tensor over torch.distributed: {result.error}"
        return Finding(Level.WARNING, text, "check that processes on this machine can connect to each other.")
    have = ", ".join(name for name in ("gloo", "nccl") if result.facts.get(name))
    return Finding(Level.OK, f"Two workers summed a tensor over torch.distributed ({have}; {result.seconds:.1f} s)")


def _compiler(env: Mapping[str, str], standard: int) -> Finding:
    try:
        compiler = preflight.require_compiler(env, standard)
    except InstallError as error:
        return Finding(Level.NOTE, f"{error.cause} It is needed only to rebuild Horovod.", error.fix)
    result = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return Finding(Level.OK, f"C++ compiler {compiler}: {(result.stdout.splitlines() or ['unknown version'])[0]}")


def _origin(version: str, built: recipe.Recipe | None) -> Finding:
    if built is None:
        return Finding(Level.NOTE, f"Horovod {version}, not built by hvd-slowmo, without a record of its build")
    targets = ", ".join(f"{name} {target}" for name, target in built.frameworks.items())
    if built.patches != patches.digest(repairs.PATCHES):
        return Finding(
            Level.NOTE,
            f"Horovod {version}, built for {targets} with the patches of another hvd-slowmo version",
            _INSTALL,
        )
    return Finding(Level.OK, f"Horovod {version}, built for {targets} with this hvd-slowmo's patches")


def _launcher(env: Mapping[str, str]) -> Finding:
    places = os.pathsep.join([env.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    found = shutil.which("horovodrun", path=places)
    if found is None:
        return Finding(Level.PROBLEM, "The command horovodrun, which starts the workers, is missing", _INSTALL)
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
            f"Horovod was built for {framework.title} {target}, but {framework.version} is installed: it may crash",
            _INSTALL,
        )


def _allreduce(framework: Framework, targets: Mapping[str, str]) -> tuple[Finding, check.Result]:
    result = check.allreduce(framework.name)
    if result.error is None:
        return Finding(
            Level.OK, f"Two workers summed a tensor over Horovod with {framework.title} ({result.seconds:.1f} s)"
        ), result
    if framework.name not in targets:
        text = f"Horovod was built without {framework.title}"
        fix = "run `hvd-slowmo install-horovod`, which builds for every installed framework."
        return Finding(Level.PROBLEM, text, fix), result
    text = f"Two workers could not sum a tensor over Horovod with {framework.title}: {result.error}"
    fix = (
        "run `hvd-slowmo install-horovod --rebuild`. If it fails again, check that processes on this machine can "
        "connect to each other on 127.0.0.1."
    )
    return Finding(Level.PROBLEM, text, fix), result


def _operations(facts: Mapping[str, bool], frameworks: tuple[Framework, ...]) -> Finding:
    have = [name for name in ("gloo", "mpi", "nccl") if facts.get(name)]
    text = "Horovod's operations: " + (", ".join(have) or "none")
    if not facts.get("nccl") and any(framework.cuda for framework in frameworks):
        fix = "for GPU training over NCCL, run `hvd-slowmo install-horovod --nccl`; it needs the CUDA toolkit."
        text += "; GPU tensors are refused in PyTorch and copied to the CPU in TensorFlow"
        return Finding(Level.NOTE, text, fix)
    return Finding(Level.OK, text)


def _repairs(framework: Framework, built: recipe.Recipe | None) -> Iterator[Finding]:
    """Report the repairs of the installed Horovod, by their effect where that takes seconds, or by the record."""
    recorded = built.repairs if built is not None else ()
    if repairs.STALL_CHECK.name in recorded:
        yield _repair(repairs.STALL_CHECK, None)
    else:
        result = check.stall(framework.name)
        yield _repair(repairs.STALL_CHECK, result.error, f" ({result.seconds:.1f} s)")
    yield _repair(ELASTIC_RECOVERY, _unrecorded(ELASTIC_RECOVERY, recorded))
    yield _repair(SIGNED_SERVICES, check.strangers().error, " (a stranger's requests were refused)")
    yield _repair(LAUNCHER, _unrecorded(LAUNCHER, recorded))


def _unrecorded(repair: Repair, recorded: Sequence[str]) -> str | None:
    return None if repair.name in recorded else "no record says that Horovod was built with it"


def _repair(repair: Repair, error: str | None, evidence: str = "") -> Finding:
    if error is None:
        return Finding(Level.OK, f"Horovod's {repair.name}: repaired{evidence}")
    return Finding(Level.WARNING, f"Horovod's {repair.name}: not repaired: {repair.without}", _INSTALL)
