"""torchft's LocalSGD and DiLoCo as methods of step_time.py, where torchft is installed.

torchft brings packages that nothing else here needs, so give it an environment of its own:

    python -m venv .venv-torchft && .venv-torchft/bin/pip install ".[torch]" torchft==0.2.0
    benchmarks/link.sh 1gbit env GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 .venv-torchft/bin/torchrun \
        --nproc-per-node 2 benchmarks/step_time.py --rounds 3 --pause 130 --methods "torchft LocalSGD" \
        "torchft DiLoCo" "torchft DiLoCo, streamed" "ours: SlowMo" "ours: SlowMo, streamed"

Each worker is a replica group of one. Before an exchange torchft asks for a quorum at its lighthouse, which runs beside
rank 0. To torchft a failed exchange is a discarded block and no error, so `check_committed` looks at what came of it.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo, LocalSGD

_TIMEOUT = timedelta(seconds=60)
_managers: list[CountingManager] = []
Wrapped = tuple[nn.Module, torch.optim.Optimizer]


def methods(tau: int) -> dict[str, Callable[[nn.Module, torch.optim.Optimizer], Wrapped]]:
    """Return the methods; "streamed" is two fragments, one step late."""
    return {
        "torchft LocalSGD": partial(_local_sgd, tau),
        "torchft DiLoCo": partial(_diloco, tau, 0, lambda model: [model]),
        "torchft DiLoCo, streamed": partial(_diloco, tau, 1, lambda model: [model[:2], model[2:]]),
    }


def check_committed() -> None:
    """Raise RuntimeError where an exchange was discarded, so that the times mean nothing."""
    for manager in _managers:
        if manager.current_step() != manager.attempts:
            raise RuntimeError(
                f"torchft has committed {manager.current_step()} of {manager.attempts} exchanges of a method; its log "
                "says why"
            )


def _local_sgd(tau: int, model: nn.Module, inner: torch.optim.Optimizer) -> Wrapped:
    LocalSGD(_manager(), model, inner, sync_every=tau).__enter__()
    return model, inner


def _diloco(
    tau: int,
    delay: int,
    split: Callable[[nn.Module], list[nn.Module]],
    model: nn.Module,
    inner: torch.optim.Optimizer,
) -> Wrapped:
    parts = split(model)
    outer = [torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9, nesterov=True) for part in parts]
    DiLoCo(_manager(), parts, inner, outer, sync_every=tau, fragment_sync_delay=delay).__enter__()
    return model, inner


class CountingManager(Manager):
    """A manager that counts the exchanges that it was to commit."""

    attempts = 0

    def should_commit(self, timeout: timedelta | None = None) -> bool:
        self.attempts += 1
        return super().should_commit(timeout)


def _manager() -> Manager:
    """Return a manager with a lighthouse and a store of its own, so that methods do not meet in one quorum."""
    workers = dist.get_world_size()
    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=workers) if dist.get_rank() == 0 else None
    port = [lighthouse.address().rsplit(":", 1)[1] if lighthouse else None]
    dist.broadcast_object_list(port)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = CountingManager(
        pg=ProcessGroupGloo(timeout=_TIMEOUT),
        load_state_dict=lambda state: None,
        state_dict=dict,
        min_replica_size=workers,
        use_async_quorum=False,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=f"http://127.0.0.1:{port[0]}",
        replica_id=f"worker_{dist.get_rank()}",
        hostname="127.0.0.1",
        init_sync=False,  # all workers make the same network
    )

    atexit.register(_close, manager, lighthouse, store)
    _managers.append(manager)
    return manager


def _close(manager: Manager, lighthouse: LighthouseServer | None, store: dist.TCPStore) -> None:
    """End the servers' threads; the store is kept until then."""
    manager.shutdown(wait=False)
    if lighthouse:
        lighthouse.shutdown()
