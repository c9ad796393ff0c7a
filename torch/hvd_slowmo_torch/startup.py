"""Before the first step: what the layout's chunks do not carry comes from rank 0 too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.core.startup import Job, hand_out
from hvd_slowmo.wire.tensors import TensorSpec
from hvd_slowmo_torch.interop.weights import read_torch, write_torch


def hand_out_rest(
    comm: Comm, name: str, job: Job, model: nn.Module, base: Optimizer, entries: Sequence[TensorSpec]
) -> None:
    """What the chunks do not carry: parameters that are not trained, other buffers, the base's state. A collective.

    Args:
        entries: those of the wire, or of the model where there is no map; "frozen" ones are in a map's only.
    """
    frozen = [entry for entry in entries if entry.rule == "frozen"]
    still = {key for key, p in model.named_parameters() if not p.requires_grad}  # chunks leave these alone
    carried = {entry.own for entry in entries if entry.rule != "frozen"} - still
    others = carried | {entry.own for entry in frozen}
    named = [*model.named_parameters(), *model.named_buffers()]
    rest = {key: x.detach() for key, x in named if key not in others}
    values, own = hand_out(
        comm,
        name,
        job,
        lambda: read_torch(model, frozen),
        lambda: _on_cpu(({**rest}, base.state_dict())),
    )
    if values is not None:
        write_torch(model, frozen, values)
    if own is None:
        return
    tensors, state = own
    for key, tensor in rest.items():
        tensor.copy_(tensors[key])
    mine = base.state_dict()
    if state["state"] or mine["state"] or _settings(state) != _settings(mine):
        base.load_state_dict(state)


def hand_over(comm: Comm, name: str, source: int, base: Optimizer) -> None:
    """Everybody gets one worker's base optimizer state; rates and other settings stay. A collective."""
    mine = _on_cpu(base.state_dict()["state"]) if comm.rank == source else None
    state = comm.gather(f"{name}.state", mine)[source]
    if comm.rank != source:
        groups = base.param_groups
        base.load_state_dict({**base.state_dict(), "state": state})
        base.param_groups = groups  # loading copies them, and schedulers may hold a rate that is a tensor


def _on_cpu(item: Any) -> Any:
    """The same structure with tensors in host memory: another worker's devices are not this one's."""
    if isinstance(item, torch.Tensor):
        return item.cpu()
    if isinstance(item, dict):
        return {key: _on_cpu(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return type(item)(_on_cpu(value) for value in item)
    return item


def _settings(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The param_groups, with rates that are tensors as numbers so that they can be compared."""
    return [
        {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
