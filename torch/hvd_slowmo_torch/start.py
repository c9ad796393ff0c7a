"""Before the first step: what the layout's chunks do not carry comes from rank 0 too."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hvd_slowmo.comm import Comm
from hvd_slowmo.layout import Layout


def broadcast_rest(comm: Comm, name: str, model: nn.Module, base: Optimizer, layout: Layout) -> None:
    """Frozen parameters and those that the base optimizer lacks, other buffers, the base's state. A collective."""
    carried = {entry.name for segment in layout.segments for entry in segment.entries}
    frozen = {key: p for key, p in model.named_parameters() if not p.requires_grad}  # chunks leave these alone
    others = {key: x for key, x in [*model.named_parameters(), *model.named_buffers()] if key not in carried}
    rest = {key: tensor.detach() for key, tensor in {**frozen, **others}.items()}
    mine = _on_cpu(({**rest}, base.state_dict())) if comm.rank == 0 else None
    tensors, state = comm.gather(f"{name}.start", mine)[0]
    if comm.rank == 0:
        return
    for key, tensor in rest.items():
        tensor.copy_(tensors[key])
    own = base.state_dict()
    if state["state"] or own["state"] or _settings(state) != _settings(own):
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
