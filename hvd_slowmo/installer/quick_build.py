"""Patches that shorten Horovod's build; what is built stays the same.

Files that are compiled together share the headers that each of them would parse. CMake joins them ("unity build"). Only
the sources that every build has are known to bear it, so in a build with MPI or for GPUs the libraries that have more
are compiled file by file.
"""

from __future__ import annotations

from hvd_slowmo.installer.patches import Patch


def _narrow_includes(path: str) -> Patch:
    return Patch(
        path=path,
        before="#include <torch/extension.h>\n#include <torch/torch.h>\n",
        after="#include <torch/csrc/utils/pybind.h>\n#include <torch/types.h>\n",
        reason="PyTorch's whole C++ frontend takes a third of the time of Horovod's two largest files; they use "
        "tensors and their binding to Python",
    )


def _together(path: str, target: str, after: str, unless: tuple[str, ...], batch: int, alone: str = "") -> Patch:
    """Compile the files of a library in groups.

    Args:
        path: its CMakeLists.txt.
        target: its name there.
        after: the line after which it is known.
        unless: CMake variables of builds that have other files.
        batch: files of a group.
        alone: a file that can't be in one.
    """
    condition = " AND ".join(f"NOT {name}" for name in unless)
    lines = [
        f"if({condition})",
        f"    set_target_properties({target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE {batch})",
        *([f"    set_source_files_properties({alone} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)"] if alone else []),
        "endif()",
    ]
    return Patch(
        path=path,
        before=f"{after}\n",
        after="\n".join([after, *lines, ""]),
        reason="the files of a library parse the same headers: together they take less time",
    )


_OTHER_FILES = ("HAVE_MPI", "HAVE_CUDA", "HAVE_ROCM", "HAVE_CCL", "HAVE_NVTX")

QUICK: tuple[Patch, ...] = (
    Patch(
        path="CMakeLists.txt",
        before='string(REPLACE "-O2" "-O3" CMAKE_CXX_FLAGS_RELWITHDEBINFO',
        after='string(REPLACE "-O2 -g" "-O3" CMAKE_CXX_FLAGS_RELWITHDEBINFO',
        reason="debug information takes a third of the build's time and most of the wheel's size",
    ),
    _narrow_includes("horovod/torch/adapter_v2.h"),
    _narrow_includes("horovod/torch/mpi_ops_v2.cc"),
    _together(
        "third_party/gloo/gloo/CMakeLists.txt",
        target="gloo",
        after="add_library(gloo ${GLOO_STATIC_OR_SHARED} ${GLOO_SRCS})",
        unless=("USE_MPI", "USE_LIBUV"),
        batch=10,
        alone="allreduce_local.cc",  # a name in it is ambiguous beside other files
    ),
    _together(
        "horovod/torch/CMakeLists.txt",
        target="${PYTORCH_TARGET_LIB}",
        after='set_target_properties(${PYTORCH_TARGET_LIB} PROPERTIES PREFIX "")',
        unless=(*_OTHER_FILES, "Pytorch_ROCM"),
        batch=8,
    ),
    _together(
        "horovod/tensorflow/CMakeLists.txt",
        target="${TF_TARGET_LIB}",
        after='set_target_properties(${TF_TARGET_LIB} PROPERTIES PREFIX "")',
        unless=_OTHER_FILES,
        batch=8,
    ),
)
"""Patches that change nothing but the time and the size of the build."""
