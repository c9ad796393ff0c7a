"""Parameter groups that are added to the inner optimizer after the start."""

from __future__ import annotations

from typing import Any

import torch

from hvd_slowmo.core.regroup.dealing import deal_extended
from hvd_slowmo.core.start.bulk import Gift, Parcel, give
from hvd_slowmo.core.start.startup import agree
from hvd_slowmo_torch.inner import inner_settings
from hvd_slowmo_torch.startup import StartingTorchWorker
from hvd_slowmo_torch.tensors.bulk import TorchCarrier, bodies_of
from hvd_slowmo_torch.worker import TorchWorker


def add_param_group(worker: TorchWorker, param_group: dict[str, Any]) -> None:
    """Add a group to the inner optimizer: all workers get rank 0's values of it. A collective.

    Raises:
        ValueError: on every worker, if the group is wrong on one, or differs; the optimizer is as before.
    """
    _refuse_unaddable(worker)
    inner, before, hooks, former = worker.inner, worker.store, worker.hooks, worker.assembly.runtime
    count = len(inner.param_groups)
    # Nothing is in flight but what a load has dropped, whose names are taken until it has been awaited.
    progress = worker.assembly.machine.complete(worker.progress)
    try:
        description = agree(StartingTorchWorker(worker, param_group), worker.comm)
    except Exception:
        del inner.param_groups[count:]
        raise
    added = inner.param_groups[-1]
    inner_settings.record(inner)
    with torch.no_grad():
        values = bodies_of({str(number): p for number, p in enumerate(added["params"])})
        give(worker.comm, "group", [Parcel(0, lambda: Gift(values))], TorchCarrier())
        hooks.remove()
        worker.assemble(description.layout, description.groups, worker.assembly.graph)
        worker.hooks.accumulating = hooks.accumulating
        worker.store.adopt(before)
        worker.assembly.runtime.keep_news(former)
        deal_extended(worker.assembly.runtime, former)
    ops = worker.assembly.runtime.ops
    worker.progress = progress._replace(
        rate_sums=ops.vector([[*progress.rate_sums[0], progress.rate_steps[0] * float(added["lr"])]]),
        gamma=ops.vector([[*progress.gamma[0], 0.0]]),
        flight=worker.assembly.machine.flights.initial(),
    )
    worker.prepare()


def _refuse_unaddable(worker: TorchWorker) -> None:
    """Raise ValueError where groups can't be added, or not now."""
    config = worker.config
    if worker.settings.parameter_map is not None:
        raise ValueError(
            "with a parameter_map no parameters can be added: workers of another framework can't follow. Give the "
            "inner optimizer all of them before SlowMo is constructed."
        )
    worker.refuse_elsewhere("add_param_group()")
    worker.presence.refuse_if_left()
    if not worker.assembly.machine.mixing.at_rest(worker.progress.mixing):
        raise ValueError(
            "parameters can't be added while messages are on their way or push-sum weights differ from 1. Add them "
            "before the first step, or right after join() or an outer step."
        )
    if config.fragments > 1 or config.shards or any(worker.progress.flight.launched):
        raise ValueError(
            "parameters can't be added with fragments > 1 or shard=True, whose blocks and slices they would move "
            f"to other parameters, or while an exchange is in flight. Received: fragments={config.fragments}, "
            f"delay={config.delay}, shard={config.shard}. Construct another SlowMo, or, with one "
            "fragment and shard=False, call join() first."
        )
