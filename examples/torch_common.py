"""Device and TensorBoard files of the PyTorch examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import hvd_slowmo.torch as slowmo


def choose_device() -> torch.device:
    """Return this worker's GPU, or the CPU with one thread: several workers share the machine's cores."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", slowmo.local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def logger(logdir: Path | None, name: str) -> Callable[[slowmo.SlowMo], None]:
    """Return a function that writes the optimizer's metrics to TensorBoard after each outer step, on rank 0 only."""
    if logdir is None or slowmo.rank() != 0:
        return lambda optimizer: None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(logdir / name))

    def log(optimizer: slowmo.SlowMo) -> None:
        metrics = optimizer.metrics()
        if metrics is not None and metrics.step == optimizer.steps:
            for key, value in metrics._asdict().items():
                writer.add_scalar(f"slowmo/{key}", value, metrics.step)

    return log


class Mean:
    """Mean of the losses since the last one was taken; it stays on the device, and goes into checkpoints."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | float = 0.0
        self._count = 0

    def add(self, loss: torch.Tensor) -> None:
        """Add a loss."""
        self._sum = self._sum + loss.detach().double()
        self._count += 1

    def take(self) -> float:
        """Return the mean, and begin anew."""
        mean = float(self._sum) / max(self._count, 1)
        self._sum, self._count = 0.0, 0
        return mean

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"sum": float(self._sum), "count": self._count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self._sum, self._count = state["sum"], int(state["count"])
