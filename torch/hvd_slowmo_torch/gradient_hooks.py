"""Averaged gradients are complete when backward returns, so that clipping, `unscale_` and the scaler see the average.

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

import torch
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from hvd_slowmo.core.gradient_average import GradientMean
from hvd_slowmo_torch.store import TorchStore


class BackwardMean:
    """Hooks on the parameters that average the gradients of one optimizer.

    Args:
        exchange: the core's exchange, of the workers over which this step averages.
        store: where chunks lie.
        begin: called when the first gradient of a step comes; raises where nothing can be averaged any more.
        send_rest, finish: called when backward is over. All optimizers whose parameters a backward has reached send
            before one of them waits, or workers that reach different ones would wait for each other.

    The three are methods, and held weakly: hooks on parameters must not keep an optimizer alive that nobody uses.
    """

    def __init__(
        self,
        exchange: GradientMean,
        store: TorchStore,
        begin: Callable[[], None],
        send_rest: Callable[[], None],
        finish: Callable[[], None],
    ) -> None:
        self.exchange = exchange
        self.due = False  # whether the coming step averages gradients
        self.done = False  # whether that has happened
        self.accumulating = False
        self._store = store
        self._begin = weakref.WeakMethod(begin)
        self._send_rest = weakref.WeakMethod(send_rest)
        self._finish = weakref.WeakMethod(finish)
        self._task: int | None = None  # the backward that is under way
        self._lock = threading.RLock()  # backward has a thread for the CPU and one for every device, hooks run in each
        self._streams: set[torch.cuda.Stream] = set()  # where the gradients of this backward were written
        self._missing: list[int] = []  # per chunk, parameters whose gradient is not complete yet
        self._whole: list[int] = []
        self._chunks_of: dict[int, tuple[torch.Tensor, list[int]]] = {}
        self._hooks: list[RemovableHandle] = []
        for number, chunk in enumerate(exchange.chunks):
            parameters = [p for p, *_ in store.tensors(chunk)]
            self._whole.append(len(parameters))
            for p in parameters:
                self._chunks_of.setdefault(id(p), (p, []))[1].append(number)

    def register(self) -> None:
        """Put the hooks on, if they are not."""
        if not self._hooks:
            self._hooks = [_register(p, self._hook(numbers)) for p, numbers in self._chunks_of.values()]

    def remove(self) -> None:
        """Take the hooks off, and free what averaging gradients needs."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self._store.forget_gradients()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within it backward only adds to the gradients of this worker."""
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
            if self.exchange.sent:
                raise RuntimeError(
                    "a backward failed after some of its gradients had been sent to the other workers, or runs within "
                    "another. End this process and resume from the last checkpoint, or use "
                    "checkpoint(use_reentrant=False)."
                )
            _call(self._begin)
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
            while self.exchange.sent < len(self._missing) and self._missing[self.exchange.sent] <= 0:
                for stream in self._streams:  # another thread may have written this chunk's gradients
                    torch.cuda.current_stream(stream.device).wait_stream(stream)
                self.exchange.send_next()

    def _end(self, task: int) -> None:
        if task == self._task:  # and not of a backward that failed
            with torch.no_grad():
                _call(self._send_rest)
            Variable._execution_engine.queue_callback(self._wait)

    def _wait(self) -> None:
        self._task = None
        with torch.no_grad():
            _call(self._finish)


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    bound = method()
    assert bound is not None, "the optimizer lives while its backward runs"
    bound()


def _register(parameter: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Also on a frozen parameter, which may be unfrozen later: torch takes a hook from trainable ones only."""
    trainable = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        parameter.requires_grad_(trainable)
    return handle
