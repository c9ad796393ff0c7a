"""A user's script under mypy --strict (see tests/docs/test_types.py): what the public interface's types promise."""

import torch
from torch import nn

import hvd_slowmo.torch as slowmo


def train() -> float:
    model = nn.Linear(2, 1)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    config: slowmo.SlowMoConfig = slowmo.SlowMoConfig.local_sgd(4, warmup_steps=2)
    optimizer: torch.optim.Optimizer = slowmo.SlowMo(base, model, config, metrics=True)
    plain: slowmo.SlowMo = slowmo.SlowMo(base, model, tau=4, inner_state="reset", name="plain")
    assert plain.config.tau == 4
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    assert isinstance(optimizer, slowmo.SlowMo)
    with slowmo.measure(optimizer, steps=5) as measured:
        finished: bool = measured.done
    with optimizer.no_sync():
        model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler.step()
    joined: slowmo.JoinResult = optimizer.join()
    behind: int = joined.behind
    metrics: slowmo.Metrics | None = optimizer.metrics()
    loss: float = slowmo.mean(0.5, weight=32)
    losses: dict[str, torch.Tensor] = slowmo.mean({"loss": torch.ones(2)})
    assert losses["loss"].shape == (2,)
    assert loss == 0.5
    with optimizer.averaged_parameters():
        state: dict[str, object] = optimizer.state_dict()
    optimizer.load_state_dict(state)
    seconds: float = measured.training().seconds if finished else 0.0
    return behind + seconds + optimizer.steps + optimizer.bytes_sent + (0.0 if metrics is None else metrics.divergence)
