"""A PyTorch worker's part when survivors and new workers come together."""

from __future__ import annotations

import torch

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.core.regroup.dealing import FormerSlices
from hvd_slowmo.core.regroup.member import BrokenOff
from hvd_slowmo.core.regroup.membership import Reformed, come_together
from hvd_slowmo.core.regroup.places import Place
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.core.start.startup import Description
from hvd_slowmo.core.step.machine import Machine
from hvd_slowmo_torch.model.layout import TensorRef
from hvd_slowmo_torch.startup import StartingTorchWorker
from hvd_slowmo_torch.worker import TorchWorker


class TorchMember(StartingTorchWorker):
    """`hvd_slowmo.core.regroup.member.Member` of a PyTorch optimizer."""

    elastic = True

    @property
    def machine(self) -> Machine:
        return self._worker.assembly.machine

    def place(self) -> Place:
        worker = self._worker
        if not worker.started:
            return Place(framework=self.framework)
        progress, written = worker.progress, tuple(sorted(self.machine.meetings.written or ()))
        launched = tuple(progress.flight.launched.tolist())
        owner = worker.store.owner if self.config.sliced_vectors else None
        step, interrupted = int(progress.step), worker.interrupted is not None
        answers = worker.broken_off.answered == step and not interrupted
        return Place(True, step, interrupted, written, launched, owner, worker.broken_off.torn, self.framework, answers)

    @property
    def broken_off(self) -> BrokenOff:
        return self._worker.broken_off

    def reassemble(self, description: Description[TensorRef], graph: Graph | None) -> None:
        if self._worker.started:
            self._worker.reassemble(graph)
            return
        self.assemble(description, graph)
        self._worker.progress = self.machine.initial()

    def former_slices(self) -> FormerSlices | None:
        store = self._worker.store
        if store.former_slices is None:
            return None
        _, slices = store.former_slices
        return FormerSlices(store.owner, lambda vector, chunk: slices[vector][chunk].to(store.segment_of(chunk).device))

    def forget_former_slices(self) -> None:
        self._worker.store.former_slices = None
        self.machine.meetings.unanswered.clear()

    def read_progress(self) -> Progress:
        return self._worker.progress

    def write_progress(self, progress: Progress, interrupted: bool = False) -> None:
        worker = self._worker
        worker.progress = progress
        if not interrupted:
            worker.interrupted = None
        elif worker.interrupted is None:  # it has the leader's step
            worker.interrupted = worker.presence.rates()

    def count_step(self) -> None:
        worker = self._worker
        assert worker.interrupted is not None, "else there is nothing to count"
        worker.progress = self.machine.count(worker.progress, worker.interrupted)
        worker.interrupted = None

    def finish_step(self) -> None:
        self._worker.finish_step()


def reform(worker: TorchWorker, comm: Comm) -> Reformed:
    """Bring an optimizer's worker together with the present workers. A collective of all of them.

    Raises:
        TypeError, ValueError: as `hvd_slowmo.core.regroup.membership.come_together`.
    """
    worker.connect(comm)
    worker.inner.zero_grad()  # the batch is taken once more, and its gradients may have been averaged in part
    member = TorchMember(worker)
    with torch.no_grad():
        reformed = come_together(member, worker.comm)
    worker.started, worker.mixed = True, reformed.job.mixed
    worker.prepare()
    return reformed
