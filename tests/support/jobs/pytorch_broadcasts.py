"""A Horovod script whose broadcasts were left in."""

import horovod.torch as hvd
import torch
from horovod.torch.elastic import TorchState

import hvd_slowmo.torch as slowmo


def left_in():
    """Return the number of steps, whether the result is that without the broadcasts, and TorchState's refusal."""
    found = []
    for broadcasts in (False, True):
        model = torch.nn.Linear(2, 1)
        for p in model.parameters():
            torch.nn.init.constant_(p, 1 / 3)
        inner = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        optimizer = slowmo.SlowMo(inner, model, tau=2)
        if broadcasts:
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            hvd.broadcast_optimizer_state(optimizer, root_rank=0)
            assert optimizer.steps == 0
        for number in range(4):
            optimizer.zero_grad()
            model(torch.full((1, 2), 1.0 + number + hvd.rank())).sum().backward()
            optimizer.step()
        if broadcasts:
            hvd.broadcast_optimizer_state(optimizer, root_rank=0)
            assert "slowmo" not in inner.param_groups[0]
        found.append(model.weight.detach().clone())
    try:
        TorchState(model=model, optimizer=optimizer)
    except ValueError as error:
        return optimizer.steps, torch.equal(*found), str(error)
    return optimizer.steps, torch.equal(*found), ""
