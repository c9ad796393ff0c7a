"""Averaged gradients are complete when backward returns, so that clipping, `unscale_` and the scaler see the average.

As in DistributedDataParallel: hooks notice when a chunk's gradients are accumulated and send it while backward goes on;
a callback at the end of backward sends the rest and waits. Exactly one exchange per step: a worker in a join, which has
no backward of its own, answers one exchange per step of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from hvd_slowmo.gradients import GradientMean
from hvd_slowmo_torch.store import TorchStore


class BackwardMean:
    """Hooks on the parameters that average the gradients of one optimizer.

    Args:
        exchange: the core's exchange, of the workers over which this step averages.
        store: where chunks lie.
        finish: end the exchange of this step.
    """

    def __init__(self, exchange: GradientMean, store: TorchStore, finish: Callable[[], None]) -> None:
        self.exchange = exchange
        self.due = False  # whether the coming step averages gradients
        self.done = False  # whether that has happened
        self._finish = finish
        self._waiting = False  # a callback is queued for the end of this backward
        self._accumulating = False
        self._missing: list[int] = []  # per chunk, parameters whose gradient is not complete yet
        self._whole: list[int] = []
        chunks_of: dict[int, tuple[torch.Tensor, list[int]]] = {}
        for number, chunk in enumerate(exchange.chunks):
            parameters = [p for p, *_ in store.tensors(chunk)]
            self._whole.append(len(parameters))
            for p in parameters:
                chunks_of.setdefault(id(p), (p, []))[1].append(number)
        self._hooks = [_register(p, self._hook(numbers)) for p, numbers in chunks_of.values()]

    def remove(self) -> None:
        """Take the hooks off: no later step averages gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within it backward only adds to the gradients of this worker."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def _hook(self, numbers: list[int]) -> Callable[[torch.Tensor], None]:
        def accumulated(parameter: torch.Tensor) -> None:
            if not self.due or self._accumulating:
                return
            if self.done:
                raise RuntimeError(
                    "a second backward in one step, after its gradients were averaged. Put every backward but the "
                    "last one of a step, and those meant for another optimizer, under optimizer.no_sync()."
                )
            if not self._waiting:
                self._waiting = True
                self._missing = list(self._whole)
                Variable._execution_engine.queue_callback(self._end)
            for number in numbers:
                self._missing[number] -= 1
            # In a fixed order, the same on every worker, whatever order gradients come in.
            while self.exchange.sent < len(self._missing) and self._missing[self.exchange.sent] <= 0:
                self.exchange.send_next()

        return accumulated

    def _end(self) -> None:
        self._waiting = False
        with torch.no_grad():
            self._finish()


def _register(parameter: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Also on a frozen parameter, which may be unfrozen later: torch takes a hook from trainable ones only."""
    trainable = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        parameter.requires_grad_(trainable)
    return handle
