"""The transport of a PyTorch benchmark: the one of its launcher, and a gloo group of torch.distributed in any case."""

from __future__ import annotations

import argparse
from typing import Any

import torch.distributed as dist

from hvd_slowmo.comm.launcher import launched


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add the option of `connect`."""
    parser.add_argument(
        "--store", help="under horovodrun: new file for the process group of PyTorch's methods (default: a local port)"
    )


def connect(store: str | None) -> dict[str, Any]:
    """Initialize both, and return SlowMo's argument that chooses the launcher's.

    PyTorch's own methods need torch.distributed, and under torchrun nothing of Horovod is loaded.
    """
    if launched().transport == "torch":
        dist.init_process_group("gloo")
        return {"transport": "torch"}
    import horovod.torch as hvd

    hvd.init()
    where = f"file://{store}" if store else "tcp://127.0.0.1:29517"
    dist.init_process_group("gloo", init_method=where, rank=hvd.rank(), world_size=hvd.size())
    return {"transport": "horovod"}


def name() -> str:
    """Return the launcher's transport in words."""
    return "torch.distributed" if launched().transport == "torch" else "Horovod"
