"""Measure the memory that the start of a job needs beyond what it leaves behind.

    export MALLOC_MMAP_THRESHOLD_=1000000 TF_CPP_MIN_LOG_LEVEL=3
    horovodrun -np 2 python benchmarks/start_memory.py torch
    horovodrun -np 2 python benchmarks/start_memory.py keras

A model of float32 layers of 8 MiB, half of them frozen, and Adam's moments of the trained half, which are not zero:
rank 0 hands out all but the trained parameters, which travel as chunks. Prints each worker's resident memory: the
model with the moments, and the peak of the start above what it held before or holds after it (with anchor and v),
whichever is more, as a ratio to the model. Expected: at most 1.3. The variable in the environment lets glibc return
freed memory to the system, so that resident memory equals memory in use.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDE = 1448  # of a square layer: 8 MiB


def resident(line: str) -> int:
    """Return this process's resident memory in bytes: VmRSS, or its peak since the last reset, VmHWM."""
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def torch_job(layers: int, side: int, name: str) -> tuple[Any, Callable[[], Any]]:
    """Return a model with its optimizer, and the start."""
    import torch
    from torch import nn

    from hvd_slowmo.torch import SlowMo, SlowMoConfig

    model = nn.ParameterList([nn.Parameter(torch.rand(side, side)) for _ in range(layers)])
    for p in model[layers // 2 :]:
        p.requires_grad_(False)
    inner = torch.optim.Adam([p for p in model if p.requires_grad])
    for p in model[: layers // 2]:
        inner.state[p] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.rand_like(p.detach()),
            "exp_avg_sq": torch.rand_like(p.detach()),
        }
    return (model, inner), lambda: SlowMo(inner, model, SlowMoConfig(tau=12), name=name)


def keras_job(layers: int, side: int, name: str) -> tuple[Any, Callable[[], Any]]:
    """Return a model with its optimizer, and the start."""
    import keras
    import tensorflow as tf

    from hvd_slowmo.tf import SlowMo, SlowMoConfig

    stack = [keras.layers.Dense(side, use_bias=False, trainable=n < layers // 2) for n in range(layers)]
    model = keras.Sequential([keras.Input((side,)), *stack])
    inner = keras.optimizers.Adam()
    inner.build(model.trainable_variables)
    for v in inner.variables:
        if len(v.shape) == 2:
            v.assign(tf.random.uniform(v.shape))
    optimizer = SlowMo(inner, SlowMoConfig(tau=12), name=name)
    return (model, optimizer), lambda: optimizer.broadcast(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=["torch", "keras"])
    parser.add_argument("--layers", type=int, default=16, help="layers of 8 MiB (default: %(default)s)")
    args = parser.parse_args()
    if args.framework == "torch":
        import horovod.torch as hvd
        import torch

        torch.set_num_threads(1)
        hvd.init()
        hvd.allreduce(torch.zeros(2**22), name="Horovod's fusion buffer")
        job = torch_job
    else:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        hvd.allreduce(tf.zeros([2**22]), name="Horovod's fusion buffer")
        job = keras_job
    job(4, 8, "small")[1]()  # excludes what libraries load at first use
    nothing = resident("VmRSS")
    kept, start = job(args.layers, SIDE, "large")
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    kept = kept, start()
    model, extra = before - nothing, resident("VmHWM") - max(before, resident("VmRSS"))
    rank, megabytes = hvd.rank(), 2**20
    print(
        f"{args.framework}, rank {rank}: model {model / megabytes:.0f} MiB, peak of the start {extra / megabytes:.0f} "
        f"MiB above the rest: {1 + extra / model:.2f} x the model",
        flush=True,
    )
    del kept


if __name__ == "__main__":
    main()
