"""Hooks that average gradients in backward, so that clipping, `unscale_` and the scaler see the average.

As in DistributedDataParallel: hooks notice when a chunk's gradients are accumulated and send it while backward goes on;
a callback at the end of backward sends the rest and waits. Exactly one exchange per step: a worker in a join, which has
no backward of its own, answers one exchange per step of the others.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from hvd_slowmo.core.average.gradient_average import Attendance, GradientAverages
from hvd_slowmo.core.parts.schedule import StepPlan
from hvd_slowmo_torch.model.gradients import TorchGradients
from hvd_slowmo_torch.presence import WorkerPresence


class GradientHooks:
    """Hooks on the parameters that average the gradients of one optimizer.

    The hooks hold this object weakly: they must not keep an optimizer alive that nobody uses.

    Args:
        averages: the core's exchanges.
        source: the gradients.
        presence: of this worker.

    Attributes:
        due: the coming step averages gradients.
        done: that has happened.
        accumulating: within `accumulate()`.
        attendance: of the last exchange.
    """

    def __init__(self, averages: GradientAverages, source: TorchGradients, presence: WorkerPresence) -> None:
        self.due = False
        self.done = False
        self.accumulating = False
        self.attendance: Attendance | None = None
        self._averages = averages
        self._average = averages.of_all  # the coming step's exchange
        self._source = source
        self._presence = presence
        self._task: int | None = None  # the backward in progress
        self._lock = threading.RLock()  # backward has a thread for the CPU and one for every device, hooks run in each
        self._streams: set[torch.cuda.Stream] = set()  # on which the gradients of this backward were written
        self._missing: list[int] = []  # per chunk, parameters whose gradient is not complete yet
        self._whole: list[int] = []
        self._chunks_of: dict[int, tuple[torch.Tensor, list[int]]] = {}
        self._hooks: list[RemovableHandle] = []
        for number, chunk in enumerate(self._average.chunks):
            parameters = source.parameters(chunk)
            self._whole.append(len(parameters))
            for p in parameters:
                self._chunks_of.setdefault(id(p), (p, []))[1].append(number)

    def prepare(self, plan: StepPlan) -> None:
        """Get ready for the coming step: put the hooks on if it averages gradients, take them off if not."""
        self._average = self._averages.of(plan)
        self.due = bool(self._averages.due(plan))
        self.done = False
        self.attendance = None
        if not self.due:
            self.remove()
        elif not self._hooks:
            self._hooks = [_register(p, self._hook(numbers)) for p, numbers in self._chunks_of.values()]

    def remove(self) -> None:
        """Take the hooks off, and free the memory of averaged gradients."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self._source.forget()

    @property
    def missing(self) -> bool:
        """True while the coming step is to average gradients and no backward has done it."""
        return self.due and not self.done

    @property
    def catch_up_from(self) -> int:
        """The worker whose parameters count at the end of the warm-up."""
        return 0 if self.attendance is None else int(self._average.catch_up_from.get())

    @torch.no_grad()
    def average(self) -> Attendance:
        """Average the gradients now, where no backward has done it."""
        self._send_rest()
        return self._finish()

    def averaged(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure with averaged gradients, also where it makes them without backward."""

        def evaluate() -> Any:
            loss = closure()
            if self.missing:
                self.average()
            return loss

        return evaluate

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let backward only add to the gradients of this worker."""
        before, self.accumulating = self.accumulating, True
        try:
            yield
        finally:
            self.accumulating = before

    def _hook(self, numbers: list[int]) -> Callable[[torch.Tensor], None]:
        me = weakref.ref(self)

        def accumulated(parameter: torch.Tensor) -> None:
            owner = me()
            if owner is not None and owner.due:
                with owner._lock:
                    owner._accumulated(parameter, numbers)

        return accumulated

    def _accumulated(self, parameter: torch.Tensor, numbers: list[int]) -> None:
        if self.done:
            raise RuntimeError(
                "a second backward in one step, after its gradients were averaged. Put every backward but the last one "
                "of a step, and those meant for another optimizer, under optimizer.no_sync(), and call step() after "
                "each averaged one. A backward within a backward, as of checkpoint(use_reentrant=True), can't work: "
                "use checkpoint(use_reentrant=False)."
            )
        if self.accumulating:
            return
        task = torch._C._current_graph_task_id()
        if self._task != task:
            if self._average.sent:
                raise RuntimeError(
                    "a backward failed after some of its gradients had been sent to the other workers, or runs within "
                    "another. End this process and resume from the last checkpoint, or use "
                    "checkpoint(use_reentrant=False)."
                )
            self._presence.refuse_if_left()
            self._task = task
            self._missing = list(self._whole)
            self._streams = set()
            Variable._execution_engine.queue_callback(partial(self._end, task))
        for number in numbers:
            self._missing[number] -= 1
        if parameter.is_cuda:
            self._streams.add(torch.cuda.current_stream(parameter.device))
        # In a fixed order, the same on every worker, whatever order gradients come in.
        with torch.no_grad():
            while self._average.sent < len(self._missing) and self._missing[self._average.sent] <= 0:
                for stream in self._streams:  # another thread may have written this chunk's gradients
                    torch.cuda.current_stream(stream.device).wait_stream(stream)
                self._average.send_next(self._source)

    def _end(self, task: int) -> None:
        # All optimizers whose parameters a backward has reached send before one of them waits: otherwise workers that
        # reach different ones would wait for each other.
        if task == self._task:  # and not of a backward that failed
            with torch.no_grad():
                self._send_rest()
            Variable._execution_engine.queue_callback(self._wait)

    def _wait(self) -> None:
        self._task = None
        with torch.no_grad():
            self._finish()

    def _send_rest(self) -> None:
        self._average.send_rest(self._source, self._presence.now())

    def _finish(self) -> Attendance:
        self.attendance = self._average.finish(self._source)
        self.done = True
        return self.attendance


def _register(parameter: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Register a hook, also on a frozen parameter, which may be unfrozen later: torch takes trainable ones only."""
    trainable = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        parameter.requires_grad_(trainable)
    return handle
