"""Costs of the files of Horovod 0.28.1: processor seconds of their compilation, measured in one build.

gcc 12, `-O3`, PyTorch 2.13 and TensorFlow 2.21. Relations are alike on other machines.
"""

from __future__ import annotations

from collections.abc import Mapping

_GLOO_TOGETHER = {
    "Unity/unity_3_cxx.cxx": 8,
    "Unity/unity_2_cxx.cxx": 5,
    "Unity/unity_1_cxx.cxx": 8,
    "Unity/unity_0_cxx.cxx": 4,
}
_TENSORFLOW_TOGETHER = {
    "Unity/unity_3_cxx.cxx": 43,
    "Unity/unity_2_cxx.cxx": 34,
    "Unity/unity_1_cxx.cxx": 17,
    "Unity/unity_0_cxx.cxx": 20,
}
_PYTORCH_TOGETHER = {
    "Unity/unity_3_cxx.cxx": 55,
    "Unity/unity_2_cxx.cxx": 32,
    "Unity/unity_1_cxx.cxx": 17,
    "Unity/unity_0_cxx.cxx": 19,
}

_GLOO = {
    "algorithm.cc": 2,
    "allgather.cc": 3,
    "allgatherv.cc": 3,
    "allreduce.cc": 5,
    "allreduce_local.cc": 3,
    "alltoall.cc": 2,
    "alltoallv.cc": 3,
    "barrier.cc": 1,
    "broadcast.cc": 2,
    "context.cc": 2,
    "gather.cc": 2,
    "gatherv.cc": 3,
    "reduce.cc": 3,
    "scatter.cc": 2,
    "types.cc": 1,
    "common/logging.cc": 2,
    "common/linux.cc": 5,
    "rendezvous/context.cc": 6,
    "rendezvous/file_store.cc": 7,
    "rendezvous/hash_store.cc": 4,
    "rendezvous/prefix_store.cc": 4,
    "rendezvous/store.cc": 2,
    "transport/address.cc": 1,
    "transport/buffer.cc": 1,
    "transport/context.cc": 3,
    "transport/device.cc": 2,
    "transport/pair.cc": 2,
    "transport/unbound_buffer.cc": 1,
    "transport/tcp/address.cc": 3,
    "transport/tcp/buffer.cc": 4,
    "transport/tcp/context.cc": 4,
    "transport/tcp/device.cc": 5,
    "transport/tcp/error.cc": 1,
    "transport/tcp/loop.cc": 3,
    "transport/tcp/pair.cc": 10,
    "transport/tcp/socket.cc": 3,
    "transport/tcp/unbound_buffer.cc": 3,
}
_COMMON = {
    "common.cc": 3,
    "fusion_buffer_manager.cc": 2,
    "controller.cc": 16,
    "group_table.cc": 2,
    "half.cc": 1,
    "logging.cc": 2,
    "message.cc": 11,
    "operations.cc": 18,
    "parameter_manager.cc": 8,
    "process_set.cc": 10,
    "response_cache.cc": 11,
    "stall_inspector.cc": 4,
    "thread_pool.cc": 2,
    "timeline.cc": 5,
    "tensor_queue.cc": 4,
    "ops/collective_operations.cc": 11,
    "ops/operation_manager.cc": 9,
    "optim/bayesian_optimization.cc": 14,
    "optim/gaussian_process.cc": 43,
    "utils/env_parser.cc": 3,
    "gloo/gloo_context.cc": 8,
    "gloo/gloo_controller.cc": 12,
    "gloo/http_store.cc": 8,
    "gloo/memory_store.cc": 4,
    "ops/gloo_operations.cc": 36,
}
_TENSORFLOW = {
    "mpi_ops.cc": 47,
}
_PYTORCH = {
    "handle_manager.cc": 2,
    "ready_event.cc": 2,
    "cuda_util.cc": 2,
    "mpi_ops_v2.cc": 67,
    "adapter_v2.cc": 49,
}

_WITHOUT_DEBUG_INFORMATION = 0.75
"""The files one by one were measured with `-g`: 366 s for some of gloo's and PyTorch's, 270 without."""

_COMMON_ALONE = [("common", *item) for item in _COMMON.items()]
_ALONE: dict[str, dict[str, float]] = {
    library: {f"{folder}/{name}": _WITHOUT_DEBUG_INFORMATION * seconds for folder, name, seconds in files}
    for library, files in {
        "gloo": [("gloo", *item) for item in _GLOO.items()],
        "tensorflow": [*_COMMON_ALONE, *(("tensorflow", *item) for item in _TENSORFLOW.items())],
        "pytorch": [*_COMMON_ALONE, *(("torch", *item) for item in _PYTORCH.items())],
    }.items()
}
_LAST_OF_GLOO = "gloo/allreduce_local.cc"
_TOGETHER: dict[str, dict[str, float]] = {
    "gloo": {
        **{f"gloo/{name}": seconds for name, seconds in _GLOO_TOGETHER.items()},
        _LAST_OF_GLOO: _ALONE["gloo"][_LAST_OF_GLOO],
    },
    "tensorflow": {f"tensorflow/{name}": seconds for name, seconds in _TENSORFLOW_TOGETHER.items()},
    "pytorch": {f"torch/{name}": seconds for name, seconds in _PYTORCH_TOGETHER.items()},
}

_OTHERS = 4
"""Cost of a file that is not in the tables: with MPI or CUDA there are more."""


def target_costs(target: str, together: bool) -> Mapping[str, float]:
    """Return the costs of a library's files; gloo is built under several names.

    Args:
        target: its name.
        together: files are compiled in groups, see quick_build.py.

    Example:
        >>> target_costs("compatible17_gloo", True) == target_costs("gloo", True)
        True
    """
    return (_TOGETHER if together else _ALONE).get("gloo" if target.endswith("gloo") else target, {})


def cost(name: str) -> float:
    """Return the cost of a file or of a group.

    Example:
        >>> cost("torch/mpi_ops_v2.cc") > 10 * cost("common/logging.cc")
        True
    """
    return next((files[name] for files in (*_TOGETHER.values(), *_ALONE.values()) if name in files), _OTHERS)
