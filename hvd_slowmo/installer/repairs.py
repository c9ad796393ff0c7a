"""All patches of Horovod 0.28.1: those that make it build, those that make that quick, and the repairs."""

from __future__ import annotations

from hvd_slowmo.installer.elastic_repair import ELASTIC_RECOVERY
from hvd_slowmo.installer.launcher_repair import LAUNCHER
from hvd_slowmo.installer.patches import Patch, Repair
from hvd_slowmo.installer.quick_build import QUICK
from hvd_slowmo.installer.services_repair import SIGNED_SERVICES

CXX_STANDARD = "HVD_SLOWMO_CXX_STANDARD"
"""Environment variable of the build that holds the C++ standard to compile with."""

_CXX = (
    "PyTorch's headers need C++17 since 2.1 and C++20 in its newest releases; gloo and the PyTorch extension must be "
    "compiled with the same standard, or linking fails"
)

BUILD: tuple[Patch, ...] = (
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
"""Patches without which Horovod does not build against current frameworks and Pythons."""

STALL_CHECK = Repair(
    name="stall check",
    without="a worker that waits forever is never reported, for any HOROVOD_STALL_* setting",
    patches=(
        Patch(
            path="horovod/common/gloo/gloo_controller.cc",
            before="global_ranks_.reserve(size_);",
            after="global_ranks_ = std::vector<int>(size_);",
            reason="reserve() leaves the vector empty, so the stall check examines no rank and never reports a stall",
        ),
    ),
)

REPAIRS: tuple[Repair, ...] = (STALL_CHECK, ELASTIC_RECOVERY, SIGNED_SERVICES, LAUNCHER)

PATCHES: tuple[Patch, ...] = (*BUILD, *QUICK, *(patch for repair in REPAIRS for patch in repair.patches))


def included(patches: tuple[Patch, ...]) -> tuple[str, ...]:
    """Return the names of the repairs whose patches are all among `patches`."""
    return tuple(repair.name for repair in REPAIRS if set(repair.patches) <= set(patches))
