"""A PyTorch worker's part in a join."""

from __future__ import annotations

import torch

from hvd_slowmo.core.average.gradient_average import Attendance, GradientAverage
from hvd_slowmo.core.parts.progress import Progress, Scalar
from hvd_slowmo.core.parts.schedule import StepPlan
from hvd_slowmo.core.regroup.join import take_part
from hvd_slowmo_torch.startup import hand_over
from hvd_slowmo_torch.worker import TorchWorker


def take_part_in_join(
    worker: TorchWorker, optimizer: torch.optim.Optimizer, leaving: bool, scaler: torch.amp.GradScaler | None
) -> tuple[int, ...]:
    """Take part in a join; return the ranks of the workers that leave. A collective.

    Args:
        worker: the optimizer's.
        optimizer: SlowMo itself, whose step a scaler takes.
        leaving: this worker stops for good.
        scaler: the GradScaler, if gradients are averaged under one.
    """
    presence, assembly = worker.presence, worker.assembly
    worker.store.watch.look(mixes=worker.config.gossip is not None)
    presence.joining, presence.leaving, worker.broken_off.answered = True, leaving, None
    try:
        with torch.no_grad():
            joining = JoiningTorchWorker(worker, optimizer, scaler)
            left = take_part(assembly.machine, assembly.averages, joining, int(leaving))
    except RuntimeError:  # of a transport
        worker.broken_off.answered = int(worker.progress.step)
        raise
    finally:
        presence.joining = presence.leaving = False
        worker.prepare()
    presence.left = tuple(rank for rank, gone in zip(worker.comm.ranks, left, strict=True) if gone)
    if not presence.left:
        worker.roll.joined(int(worker.progress.step))
    return presence.left


class JoiningTorchWorker:
    """`hvd_slowmo.core.regroup.join.JoiningWorker` of a PyTorch optimizer.

    Args:
        worker: the optimizer's.
        optimizer: SlowMo itself, whose step a scaler takes.
        scaler: the GradScaler, if gradients are averaged under one.
    """

    def __init__(
        self, worker: TorchWorker, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> None:
        self._worker = worker
        self._optimizer = optimizer
        self._scaler = scaler

    def read_progress(self) -> Progress:
        return self._worker.progress

    def write_progress(self, progress: Progress) -> None:
        self._worker.progress = progress

    def exchange_nothing(self, average: GradientAverage, leaving: Scalar) -> Attendance:
        self._optimizer.zero_grad()
        return self._worker.hooks.average()

    def follow_step(self, attendance: Attendance, plan: StepPlan) -> None:
        groups, presence = self._optimizer.param_groups, self._worker.presence
        own = [group["lr"] for group in groups]
        for number, group in enumerate(groups):
            common = presence.groups.common(number)
            rate = group["lr"] if common is None else attendance.rates[common]
            group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], torch.Tensor) else float(rate)
        try:
            with torch.enable_grad():  # as in a training step
                self._step()
        finally:
            for group, rate in zip(groups, own, strict=True):
                group["lr"] = rate
        self._optimizer.zero_grad()

    def outer_step_followed(self) -> None:
        """Do nothing: the core has done all of it."""

    def hand_over(self, average: GradientAverage) -> None:
        if not self._worker.mixed:  # inner state has no form in common with another framework's
            hand_over(self._worker.inner, average)

    def _step(self) -> None:
        if self._scaler is None:
            self._optimizer.step()
            return
        self._scaler.scale(torch.zeros((), device=self._optimizer.param_groups[0]["params"][0].device))  # first scale
        self._scaler.step(self._optimizer)
        self._scaler.update()
