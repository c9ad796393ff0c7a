"""One worker of `Pool`: jobs come on standard input, results go to standard output, everything else to stderr."""

import importlib
import os
import pickle

from hvd_slowmo.comm import naming
from support.pool import DISTRIBUTED, STALL_SHUTDOWN_S, Failed

TRANSPORT = os.environ["POOL_TRANSPORT"]


def main() -> None:
    jobs = os.fdopen(os.dup(0), "rb")
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps library output out of the results
    if TRANSPORT != DISTRIBUTED:
        # Each framework has its own Horovod, and the tests of one framework do not need the other's.
        importlib.import_module(TRANSPORT).init()
    number = 0
    while True:
        try:
            job, arguments, fatal = pickle.load(jobs)
        except EOFError:
            break
        module, name = job.split(":")
        naming.forget()  # every job is a training of its own
        if TRANSPORT == DISTRIBUTED:
            number += 1
            initialize(number)
        try:
            result = getattr(importlib.import_module(module), name)(**arguments)
        except Exception as error:
            result = Failed(type(error).__name__, str(error))
        pickle.dump(result, results)
        results.flush()
        if fatal:
            os._exit(1)
    os._exit(0)


def initialize(number: int) -> None:
    """Begin anew: process groups last until the main one ends, and every job makes some."""
    from datetime import timedelta

    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if "POOL_NCCL" in os.environ else "gloo",
        init_method=f"file://{os.environ['POOL_FOLDER']}/store{number}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=STALL_SHUTDOWN_S),
    )


if __name__ == "__main__":
    main()
