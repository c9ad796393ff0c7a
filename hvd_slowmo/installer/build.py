"""Build a wheel from Horovod's sources, isolated from the user's packages except for the frameworks."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from hvd_slowmo.installer import patches, process, repairs
from hvd_slowmo.installer.cache import is_whole
from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.frameworks import TITLES, Framework
from hvd_slowmo.installer.options import Options, default_jobs
from hvd_slowmo.installer.pip import Pip
from hvd_slowmo.installer.progress import Meter
from hvd_slowmo.installer.recipe import RECORD, Recipe
from hvd_slowmo.installer.reporter import Reporter

TOOLS = (
    "cmake>=3.22,<4",  # CMake 4 refuses the cmake_minimum_required of the gloo that Horovod bundles
    "setuptools>=70.1,<81",  # PyTorch's cpp_extension, asked for paths, used to import pkg_resources, which 82 dropped
    "wheel",
    "packaging",
)

# An outer make or the user may have set these for other projects. They would break the build or slow it down.
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
    """Install CMake and setuptools for the build into `folder`, separate from the user's packages.

    Args:
        folder: target directory; pip creates it.
        pip: pip of the running environment.
        reporter: receives the progress.

    Raises:
        InstallError: pip fails, for instance without a network.
    """
    reporter.say("Fetching the build tools (CMake, setuptools)")
    pip.run(
        ["install", "--no-user", "--quiet", "--target", str(folder), *TOOLS],
        reporter,
        what="fetching the build tools",
        fix="check the network and pip's settings (`pip config list`).",
    )


def tools_environment(tools: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of `env` with the directory `tools` first on `PYTHONPATH` and its `bin` first on `PATH`."""
    python_path = [str(tools), *filter(None, [env.get("PYTHONPATH")])]
    # The interpreter's directory too: the virtual environment may not be activated.
    path = [str(tools / "bin"), str(Path(sys.executable).parent), env.get("PATH", os.defpath)]
    return {**env, "PYTHONPATH": os.pathsep.join(python_path), "PATH": os.pathsep.join(path)}


def build_environment(
    tools: Path, env: Mapping[str, str], frameworks: tuple[Framework, ...], options: Options
) -> dict[str, str]:
    """Return the environment variables with which Horovod's setup.py builds for `frameworks`.

    Args:
        tools: directory of the build tools; see `install_tools`.
        env: the user's environment variables. Build settings of other projects are dropped.
        frameworks: the frameworks to build for.
        options: MPI, NCCL and the number of compile jobs.
    """
    own = ("HOROVOD_WITH", "HOROVOD_GPU", "HOROVOD_CPU")
    clean = {name: value for name, value in env.items() if name not in _DROPPED and not name.startswith(own)}
    result = tools_environment(tools, clean)
    result.update(
        **{repairs.CXX_STANDARD: str(cxx_standard(frameworks))},
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
    """Return the C++ standard to compile with, such as 17: the newest that any framework requires."""
    return max(framework.cxx for framework in frameworks)


def build_wheel(
    source: Path,
    recipe: Recipe,
    env: Mapping[str, str],
    jobs: int,
    log: Path,
    reporter: Reporter,
    changes: tuple[patches.Patch, ...] = repairs.PATCHES,
) -> Path:
    """Patch the sources in `source`, build them, and return the path of the wheel.

    Args:
        source: root of the unpacked sources.
        recipe: the inputs of the build; the wheel contains them as a record.
        env: environment variables of the build; see `build_environment`.
        jobs: number of files that they compile at once.
        log: file that receives the full output.
        reporter: receives the progress.
        changes: patches to apply to the sources.

    Raises:
        InstallError: a patch does not match, the build fails, or it produces no usable wheel.
    """
    patches.apply(source, changes)
    work = source.parent
    library, wheels = work / "lib", work / "dist"
    # bdist_wheel packs every file in the directory of the built package, as it does with Horovod's own metadata.json.
    record = library / RECORD
    record.parent.mkdir(parents=True)
    record.write_text(recipe.to_json(), encoding="utf-8")
    titles = " and ".join(f"{TITLES[name]} {version}" for name, version in recipe.frameworks.items())
    meter = Meter(list(recipe.frameworks), jobs, together=not any(recipe.options.values()))
    minutes = round(meter.processor_seconds / 60)
    reporter.say(f"Building Horovod {recipe.horovod} for {titles}: some {minutes} minutes of one processor's time")
    reporter.say(f"Full log: {log}")
    setup = [sys.executable, "setup.py", "build", "--build-lib", str(library), "--build-temp", str(work / "temp")]
    command = [*setup, "bdist_wheel", "--dist-dir", str(wheels)]
    status = process.run(command, log, reporter, what="building Horovod", meter=meter, env=env, cwd=source)
    if status != 0:
        raise InstallError(
            f"Horovod's build failed (exit status {status}):\n{process.first_error(log)}",
            "read the log; `hvd-slowmo doctor` lists the compiler and the versions in use.",
            log,
        )
    built = sorted(wheels.glob("*.whl"))
    if len(built) != 1 or not is_whole(built[0], recipe):
        raise InstallError(
            "Horovod's build ended without an error, but also without a usable wheel.",
            "run again with --rebuild and read the log.",
            log,
        )
    return built[0]
