"""From Horovod's sources to a wheel, apart from the user's packages except for the frameworks."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from hvd_slowmo.installer import patches, process
from hvd_slowmo.installer.cache import is_whole
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.frameworks import TITLES, Framework
from hvd_slowmo.installer.options import Options, default_jobs
from hvd_slowmo.installer.pip import Pip
from hvd_slowmo.installer.recipe import RECORD, Recipe
from hvd_slowmo.installer.reporter import Reporter

TOOLS = (
    "cmake>=3.22,<4",  # CMake 4 refuses the cmake_minimum_required of the gloo that Horovod bundles
    "setuptools>=70.1,<81",  # PyTorch's cpp_extension, asked for paths, used to import pkg_resources, which 82 dropped
    "wheel",
    "packaging",
)

# Set by an outer make or by a user for other projects, these would break or slow the build.
_DROPPED = (
    "MAKEFLAGS",
    "MFLAGS",
    "MAKELEVEL",
    "CMAKE_GENERATOR",
    "HOROVOD_DEBUG",
    "HOROVOD_SKIP_COMPILE",
    "HOROVOD_LOCAL_VERSION",
)


def install_tools(folder: Path, pip: Pip, reporter: Reporter) -> None:
    """Install the build's own CMake and setuptools into `folder`, away from the user's packages.

    Raises:
        InstallError: pip cannot.
    """
    reporter.say("Fetching the build tools (CMake, setuptools)")
    pip.run(
        ["install", "--no-user", "--quiet", "--target", str(folder), *TOOLS],
        reporter,
        what="fetching the build tools",
        cure="check the network and pip's settings (`pip config list`).",
    )


def tools_environment(tools: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return `env` with the tools first on Python's and the shell's path."""
    python_path = [str(tools), *filter(None, [env.get("PYTHONPATH")])]
    # The interpreter's own folder too: the environment need not be an activated one.
    path = [str(tools / "bin"), str(Path(sys.executable).parent), env.get("PATH", os.defpath)]
    return {**env, "PYTHONPATH": os.pathsep.join(python_path), "PATH": os.pathsep.join(path)}


def build_environment(
    tools: Path, env: Mapping[str, str], frameworks: tuple[Framework, ...], options: Options
) -> dict[str, str]:
    """Return the environment that makes Horovod's setup.py build what `options` say for `frameworks`."""
    own = ("HOROVOD_WITH", "HOROVOD_GPU", "HOROVOD_CPU")
    clean = {name: value for name, value in env.items() if name not in _DROPPED and not name.startswith(own)}
    result = tools_environment(tools, clean)
    result.update(
        **{patches.CXX_STANDARD: str(cxx_standard(frameworks))},
        HOROVOD_CMAKE=str(tools / "bin" / "cmake"),
        HOROVOD_WITH_GLOO="1",
        HOROVOD_WITHOUT_MXNET="1",
        MAKEFLAGS=f"-j{options.jobs or default_jobs()}",
        TF_CPP_MIN_LOG_LEVEL="3",
    )
    names = {framework.name for framework in frameworks}
    result["HOROVOD_WITH_MPI" if options.mpi else "HOROVOD_WITHOUT_MPI"] = "1"
    result["HOROVOD_WITH_PYTORCH" if "torch" in names else "HOROVOD_WITHOUT_PYTORCH"] = "1"
    result["HOROVOD_WITH_TENSORFLOW" if "tensorflow" in names else "HOROVOD_WITHOUT_TENSORFLOW"] = "1"
    if options.nccl:
        result["HOROVOD_GPU_OPERATIONS"] = "NCCL"
    return result


def cxx_standard(frameworks: tuple[Framework, ...]) -> int:
    """Return the C++ standard to compile with."""
    return max(framework.cxx for framework in frameworks)


def build_wheel(
    source: Path,
    recipe: Recipe,
    env: Mapping[str, str],
    log: Path,
    reporter: Reporter,
    changes: tuple[patches.Patch, ...] = patches.PATCHES,
) -> Path:
    """Patch the sources in `source` and build them; return the wheel.

    Args:
        source: root of the unpacked sources.
        recipe: what is built; it travels in the wheel.
        env: see `build_environment`.
        log: takes the whole output.
        reporter: is told how far it is.
        changes: what to change in the sources.

    Raises:
        InstallError: the build fails, or ends without a usable wheel.
    """
    patches.apply(source, changes)
    work = source.parent
    library, wheels = work / "lib", work / "dist"
    # bdist_wheel packs all that lies in the folder of the built package; Horovod's own metadata.json gets in so too.
    record = library / RECORD
    record.parent.mkdir(parents=True)
    record.write_text(recipe.to_json(), encoding="utf-8")
    titles = " and ".join(f"{TITLES[name]} {version}" for name, version in recipe.frameworks.items())
    reporter.say(f"Building Horovod {recipe.horovod} for {titles} (2 to 6 minutes on two processors)")
    reporter.say(f"Full log: {log}")
    setup = [sys.executable, "setup.py", "build", "--build-lib", str(library), "--build-temp", str(work / "temp")]
    command = [*setup, "bdist_wheel", "--dist-dir", str(wheels)]
    status = process.run(command, log, reporter, what="building Horovod", env=env, cwd=source)
    if status != 0:
        raise InstallError(
            f"Horovod's build failed (exit status {status}):\n{process.first_error(log)}",
            "the log says more; `hvd-slowmo doctor` shows the compiler and the versions in use.",
            log,
        )
    built = sorted(wheels.glob("*.whl"))
    if len(built) != 1 or not is_whole(built[0], recipe):
        raise InstallError(
            "Horovod's build ended without error, and without a usable wheel.",
            "run again with --rebuild and read the log.",
            log,
        )
    return built[0]
