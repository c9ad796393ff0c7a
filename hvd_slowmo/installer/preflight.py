"""Checks of the requirements of a build: a compiler, make, Python's headers, disk space."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hvd_slowmo.installer.errors import InstallError
from hvd_slowmo.installer.frameworks import Framework
from hvd_slowmo.installer.options import Options

NEEDED_BYTES = 2 * 10**9
"""Disk space required for a build: 0.6 GB for both frameworks, more with CUDA, plus pip's downloads."""

_COMPILERS = ("c++", "g++", "clang++")
_PROGRAM = "#include <optional>\nint main() { std::optional<int> x = 0; if constexpr (true) { return *x; } }\n"
_COMPILER_FIX = (
    "install a recent C++ compiler and make (Debian, Ubuntu: `apt install g++ make`; Fedora: `dnf install gcc-c++ "
    "make`; conda: `conda install cxx-compiler make`), or set the environment variable CXX to a compiler."
)


def require_platform() -> None:
    """Check that Horovod supports the operating system.

    Raises:
        InstallError: the operating system is Windows.
    """
    if sys.platform == "win32":
        raise InstallError(
            "Horovod does not run on Windows.", "use Linux, for instance in the Windows Subsystem for Linux (WSL)."
        )


def require_compiler(env: Mapping[str, str], standard: int = 17) -> str:
    """Return the path of the C++ compiler that CMake will use, after it has compiled a small program.

    Args:
        env: the user's environment variables.
        standard: C++ standard of the program, such as 17.

    Raises:
        InstallError: no compiler is found, or it cannot compile the program.
    """
    path = env.get("PATH", os.defpath)
    named = shlex.split(env.get("CXX", ""))
    candidates = [named[0]] if named else list(_COMPILERS)
    compiler = next((found for name in candidates if (found := shutil.which(name, path=path))), None)
    if compiler is None:
        tried = ", ".join(candidates)
        raise InstallError(
            f"No C++ compiler was found (tried {tried}). Horovod is compiled on this machine.", _COMPILER_FIX
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "try.cc")
        source.write_text(_PROGRAM, encoding="utf-8")
        command = [compiler, *named[1:], f"-std=c++{standard}", str(source), "-o", str(Path(folder, "try"))]
        result = subprocess.run(command, env=dict(env), capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise InstallError(
            f"{compiler} cannot compile a C++{standard} program:\n{result.stderr.strip()}", _COMPILER_FIX
        )
    return compiler


def require_make(env: Mapping[str, str]) -> None:
    """Check that make, which CMake runs, is installed.

    Raises:
        InstallError: neither make nor gmake is found.
    """
    path = env.get("PATH", os.defpath)
    if not any(shutil.which(name, path=path) for name in ("make", "gmake")):
        raise InstallError("The program make was not found. Horovod's build needs it.", _COMPILER_FIX)


def require_headers(frameworks: tuple[Framework, ...], include: Path | None = None) -> None:
    """Check that Python's C headers are installed, which the build for PyTorch needs.

    Args:
        frameworks: the frameworks to build for; without PyTorch, nothing is checked.
        include: directory of the headers; None: that of the running Python.

    Raises:
        InstallError: the headers are missing.
    """
    folder = Path(sysconfig.get_path("include")) if include is None else include
    if any(framework.name == "torch" for framework in frameworks) and not (folder / "Python.h").exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise InstallError(
            f"Python's C headers are missing ({folder / 'Python.h'}).",
            f"install them (Debian, Ubuntu: `apt install python{version}-dev`; Fedora: `dnf install python3-devel`).",
        )


def require_space(folder: Path, needed: int = NEEDED_BYTES) -> None:
    """Check that the disk of `folder` has enough space for a build.

    Args:
        folder: directory of the build; it need not exist.
        needed: required space in bytes.

    Raises:
        InstallError: the disk has less free space than `needed`.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InstallError(
            f"The build needs {needed / 1e9:.1f} GB on the disk of {folder}, but only {free / 1e9:.1f} GB are free.",
            "free some space, or set the environment variable XDG_CACHE_HOME to a directory on another disk.",
        )


def require_mpi(options: Options, env: Mapping[str, str]) -> None:
    """Check that MPI is installed if `options.mpi` is set.

    Raises:
        InstallError: MPI's compiler wrapper mpicxx is missing.
    """
    if options.mpi and shutil.which("mpicxx", path=env.get("PATH", os.defpath)) is None:
        raise InstallError(
            "`--mpi` needs an MPI with the compiler wrapper mpicxx, but none was found.",
            "install one (Debian, Ubuntu: `apt install libopenmpi-dev openmpi-bin`), or omit `--mpi`.",
        )


def require_cuda(options: Options, frameworks: tuple[Framework, ...], env: Mapping[str, str]) -> None:
    """Check that the frameworks use CUDA and its toolkit is installed, if `options.nccl` is set.

    Raises:
        InstallError: a framework was built without CUDA, or the CUDA toolkit is missing.
    """
    if not options.nccl:
        return
    without = [f"{framework.title} {framework.version}" for framework in frameworks if not framework.cuda]
    if without:
        raise InstallError(
            f"`--nccl` needs frameworks built with CUDA, but {' and '.join(without)} is not.",
            "install the framework's CUDA build (`pip install torch`, `pip install tensorflow[and-cuda]`), "
            "or omit `--nccl`.",
        )
    homes = [env[name] for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH") if env.get(name)]
    places = os.pathsep.join(
        [*(str(Path(home, "bin")) for home in homes), env.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    )
    if shutil.which("nvcc", path=places) is None:
        raise InstallError(
            "`--nccl` needs the CUDA toolkit with the compiler nvcc, but none was found.",
            "install NCCL's headers (Debian, Ubuntu: `apt install libnccl-dev`) and the CUDA toolkit of your "
            "framework's CUDA version, and set the environment variable CUDA_HOME to the toolkit's directory; or omit "
            "`--nccl`.",
        )
