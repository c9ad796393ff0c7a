"""Elastic jobs in PyTorch: `slowmo.elastic.State` and `slowmo.elastic.run`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hvd_slowmo.comm.elastic import Change, ElasticState, run_with
from hvd_slowmo.comm.launcher import elastic
from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo_torch.comm.workers import connect
from hvd_slowmo_torch.membership import reform
from hvd_slowmo_torch.optimizer import SlowMo

__all__ = ["Change", "State", "run"]

run = run_with("horovod.torch")
"""Decorate the function that trains: it is called again whenever workers were lost or added.

Its first argument is a `State`. Nothing before its call may communicate, SlowMo's constructor included, which does not
under an elastic launcher.
"""


class State(ElasticState):
    """The state of an elastic job: models and optimizers, and values that are the same on all workers.

    A lost worker costs its own part of the current block and nothing else: the survivors keep their parameters, and
    take the outer step that was broken off again. A new worker starts at the anchor, with the leader's inner state.

    Args:
        model: the module that is trained, or a sequence of them; becomes an attribute.
        optimizer: a SlowMo, or a sequence of them; becomes an attribute.
        values: see `hvd_slowmo.comm.elastic.ElasticState`.

    Raises:
        TypeError: `optimizer` is no SlowMo.
        ValueError: a setting can't be used in an elastic job yet.

    Example:
        >>> import torch
        >>> import hvd_slowmo.torch as slowmo
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, tau=2)
        >>> @slowmo.elastic.run
        ... def train(state):
        ...     while state.batch < 4:
        ...         state.optimizer.zero_grad()
        ...         state.model(torch.ones(8, 3)).mean().backward()
        ...         state.optimizer.step()
        ...         state.batch += 1
        ...         state.commit()
        ...     return state.optimizer.steps
        >>> train(slowmo.elastic.State(model, optimizer, batch=0))
        4
    """

    framework = "PyTorch"

    def __init__(
        self, model: nn.Module | Sequence[nn.Module], optimizer: SlowMo | Sequence[SlowMo], **values: Any
    ) -> None:
        optimizers = [optimizer] if isinstance(optimizer, SlowMo) else list(optimizer)
        if not optimizers:
            raise ValueError("`optimizer` must be a SlowMo or a sequence of them. Received an empty sequence.")
        for each in optimizers:
            if not isinstance(each, SlowMo):
                raise TypeError(
                    f"`optimizer` must be a SlowMo or a sequence of them. Received: {type(each).__name__}. Other "
                    "optimizers' workers need hvd.elastic.TorchState."
                )
            if elastic() and not each.worker.elastic:
                raise ValueError("an elastic job trains over all of Horovod's ranks: construct SlowMo without comm=.")
        self.model, self.optimizer = model, optimizer
        super().__init__([_Elastic(each) for each in optimizers], values)

    def notice(self) -> None:
        super().notice()
        for name in self._names:
            value = getattr(self, name)
            if isinstance(value, torch.amp.GradScaler):  # it waits for the end of a step that was broken off
                value._per_optimizer_states.clear()


class _Elastic:
    """`hvd_slowmo.comm.elastic.ElasticOptimizer` of a SlowMo."""

    def __init__(self, optimizer: SlowMo) -> None:
        self._worker = optimizer.worker

    @property
    def steps(self) -> int:
        return int(self._worker.progress.step)

    def come_together(self) -> tuple[ScopedComm, Sequence[int], Sequence[int], Sequence[int]]:
        worker = self._worker
        if not elastic():
            return worker.comm, range(worker.comm.size), (), ()
        reformed = reform(worker, connect(transport="horovod"))
        return worker.comm, reformed.order, reformed.newcomers, reformed.behind

    def leave(self) -> None:
        if self._worker.started:
            self._worker.assembly.machine.abandon()

    def hear(self) -> None:
        if self._worker.started:
            self._worker.assembly.runtime.regrouping.heard.set(1)

    def agreed(self) -> bool:
        heard, agreed = self._worker.assembly.runtime.regrouping
        return bool(agreed.get() or (self._worker.comm.size == 1 and heard.get()))  # alone it may never meet anybody
