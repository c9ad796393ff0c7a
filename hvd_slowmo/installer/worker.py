"""Worker of `hvd_slowmo.installer.check`: a standalone script that imports nothing from hvd_slowmo.

Arguments: "torch" or "tensorflow", for Horovod with this framework, or "torch.distributed"; and the task. In
"allreduce", both workers sum a tensor filled with rank + 1. In "stall", rank 0 waits for a tensor that rank 1 never
sends. The result is one line of JSON, with a prefix that distinguishes it from the frameworks' messages.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import ModuleType


def torch_sum(hvd: ModuleType, value: float, name: str) -> list[float]:
    """Return the sum over workers of a tensor full of `value`, as a list."""
    import torch

    total: list[float] = hvd.allreduce(torch.full((1000,), value), op=hvd.Sum, name=name).tolist()
    return total


def tensorflow_sum(hvd: ModuleType, value: float, name: str) -> list[float]:
    """Return the sum over workers of a tensor full of `value`, as a list."""
    import tensorflow as tf

    with tf.device("/cpu:0"):
        total: list[float] = hvd.allreduce(tf.fill((1000,), value), op=hvd.Sum, name=name).numpy().tolist()
    return total


def distributed() -> None:
    """Sum with torch.distributed, and print the result and the backends."""
    import torch
    import torch.distributed as dist

    store = f"file://{os.getcwd()}/store"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    total = torch.full((1000,), dist.get_rank() + 1.0)
    dist.all_reduce(total)
    facts = {"gloo": True, "nccl": dist.is_nccl_available(), "ok": total.tolist() == [3.0] * 1000}
    print("hvd-slowmo-check " + json.dumps(facts), flush=True)


def main() -> None:
    """Run the task and print its result."""
    framework, task = sys.argv[1:]
    if framework == "torch.distributed":
        distributed()
        return
    if framework == "torch":
        import horovod.torch as hvd

        total = torch_sum
    else:
        import horovod.tensorflow as hvd

        total = tensorflow_sum
    hvd.init()
    facts = {"gloo": bool(hvd.gloo_built()), "mpi": bool(hvd.mpi_built()), "nccl": bool(hvd.nccl_built())}
    if task == "allreduce":
        facts["ok"] = total(hvd, hvd.rank() + 1.0, "hvd_slowmo.check") == [3.0] * 1000
    elif hvd.rank() == 0:
        try:
            total(hvd, 1.0, "hvd_slowmo.stall")
            facts["ok"] = False
        except Exception:  # the class depends on the framework
            facts["ok"] = True
    else:
        time.sleep(60)
    print("hvd-slowmo-check " + json.dumps(facts), flush=True)
    if task == "stall":
        # Horovod has shut down after the error, and its exit handler would wait for the other worker.
        os._exit(0)


main()
