"""Patches of Horovod's sources, with their reasons."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from hvd_slowmo.installer.errors import InstallError


@dataclass(frozen=True)
class Patch:
    """One replacement in one file.

    Attributes:
        path: the file, relative to the root of the sources.
        before: the text to replace; it must occur exactly once.
        after: the replacement.
        reason: reason for the patch.
    """

    path: str
    before: str
    after: str
    reason: str


_FIX = "upgrade hvd-slowmo; this version does not support these sources."

CXX_STANDARD = "HVD_SLOWMO_CXX_STANDARD"
"""Environment variable of the build that holds the C++ standard to compile with."""

_CXX = (
    "PyTorch's headers need C++17 since 2.1 and C++20 in its newest releases; gloo and the PyTorch extension must be "
    "compiled with the same standard, or linking fails"
)

STALL_CHECK = Patch(
    path="horovod/common/gloo/gloo_controller.cc",
    before="global_ranks_.reserve(size_);",
    after="global_ranks_ = std::vector<int>(size_);",
    reason="reserve() leaves the vector empty, so the stall check examines no rank and never reports a stalled job",
)

PATCHES: tuple[Patch, ...] = (
    Patch(
        path="CMakeLists.txt",
        before="set(CMAKE_CXX_STANDARD 14)",
        after=f"set(CMAKE_CXX_STANDARD $ENV{{{CXX_STANDARD}}})",
        reason=_CXX,
    ),
    Patch(
        path="horovod/torch/CMakeLists.txt",
        before="set(CMAKE_CXX_STANDARD 14)",
        after=f"set(CMAKE_CXX_STANDARD $ENV{{{CXX_STANDARD}}})",
        reason=_CXX,
    ),
    Patch(
        path="cmake/Modules/FindPytorch.cmake",
        before='-c "import torch; from torch.utils.cpp_extension import CUDA_HOME; print(True if (',
        after='-c "import os, torch; from torch.utils.cpp_extension import CUDA_HOME; '
        "print(True if (os.environ.get('HOROVOD_GPU_OPERATIONS') and ",
        reason="a CUDA build of PyTorch next to any nvcc, complete or not, would enable CUDA without being requested",
    ),
    Patch(
        path="horovod/tensorflow/CMakeLists.txt",
        before='list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n',
        after="",
        reason="the XLA ops include a highwayhash header that is not in TensorFlow's wheel; nothing else uses them",
    ),
    STALL_CHECK,
    Patch(
        path="horovod/torch/CMakeLists.txt",
        before="from distutils.sysconfig import get_python_inc; print(get_python_inc())",
        after="import sysconfig; print(sysconfig.get_path('include'))",
        reason="Python 3.12 removed distutils",
    ),
    Patch(
        path="horovod/runner/js_run.py",
        before="from distutils.spawn import find_executable",
        after="from shutil import which as find_executable",
        reason="Python 3.12 removed distutils, and horovodrun always imports this file",
    ),
    Patch(
        path="setup.py",
        before="setup_requires=require_list if is_build_action() else [],",
        after="setup_requires=[],",
        reason="the build would download the runtime requirements a second time, without the user's pip settings",
    ),
)


def digest(patches: tuple[Patch, ...] = PATCHES) -> str:
    """Return a SHA-256 hash of the patches in hexadecimal, without their reasons."""
    sha = hashlib.sha256()
    for patch in patches:
        for part in (patch.path, patch.before, patch.after):
            sha.update(part.encode() + b"\0")
    return sha.hexdigest()


def apply(root: Path, patches: tuple[Patch, ...] = PATCHES) -> None:
    """Apply `patches` to the sources under `root`.

    Raises:
        InstallError: a file is missing, or does not contain the text to replace exactly once. No file is changed in
            this case, because all patches are tried before the first write.
    """
    texts: dict[Path, str] = {}
    for patch in patches:
        path = root / patch.path
        if path not in texts:
            texts[path] = _read(path, patch)
        count = texts[path].count(patch.before)
        if count != 1:
            raise InstallError(
                f"Horovod's {patch.path} holds {patch.before!r}, the text to replace, {count} times instead of once.",
                _FIX,
            )
        texts[path] = texts[path].replace(patch.before, patch.after)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


def _read(path: Path, patch: Patch) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InstallError(
            f"Horovod's sources have no readable {patch.path}, which must be patched ({patch.reason}): {error}.",
            _FIX,
        ) from error
