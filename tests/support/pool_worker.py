"""One worker of `Pool`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from hvd_slowmo.comm import naming
from support import forking

DISTRIBUTED = "torch.distributed"
"""The transport that is not Horovod's."""
STALL_WARNING_S, STALL_SHUTDOWN_S = 5, 90  # a trace can take half a minute on a busy machine


class Failed(Exception):
    """Error that a job raised on one worker: type name and text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind = kind
        self.text = text

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def main(connection: Connection, env: Mapping[str, str], log: Path) -> None:
    """Run jobs until there are no more; they come through `connection`, and their results go back.

    Args:
        env: environment variables of this worker.
        log: file for all output.
    """
    forking.enter(env, log)
    transport = env["POOL_TRANSPORT"]
    if transport != DISTRIBUTED:
        # Each framework has its own Horovod, and the tests of one framework do not need the other's.
        importlib.import_module(transport).init()
    number = 0
    while True:
        try:
            job, arguments, fatal = connection.recv()
        except EOFError:
            break
        module, name = job.split(":")
        naming.forget()  # every job is a training of its own
        if transport == DISTRIBUTED:
            number += 1
            initialize(number)
        try:
            result = getattr(importlib.import_module(module), name)(**arguments)
        except Exception as error:
            result = Failed(type(error).__name__, str(error))
        connection.send(result)
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
