"""SlowMo as a torch.optim.Optimizer around any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from hvd_slowmo.comm import Comm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.handshake import agree
from hvd_slowmo.machine import Machine, Progress
from hvd_slowmo.ops import EagerOps
from hvd_slowmo.schedule import block_position
from hvd_slowmo_torch import base as base_state
from hvd_slowmo_torch import checkpoint
from hvd_slowmo_torch.amp import scaled_step
from hvd_slowmo_torch.comm import connect
from hvd_slowmo_torch.start import broadcast_rest
from hvd_slowmo_torch.store import Plan, TorchStore, lay_out


class SlowMo(Optimizer):
    """Slow momentum (Wang et al., ICLR 2020, arXiv 1910.00643, Algorithm 1) around a base optimizer.

    A torch.optim.Optimizer: `param_groups`, `state` and `defaults` are the base optimizer's own, so that schedulers,
    clipping and everything else that looks at them works on either. Every `step()` is one inner step; every
    `config.tau` of them the workers average their parameters and take a momentum step.

    Construction is a collective: every rank constructs it at the same place. The workers compare their settings and
    models; then all get rank 0's parameters, buffers and base optimizer state.

    Args:
        base_optimizer: any torch.optim.Optimizer over parameters of `model`.
        model: the module that is trained; its parameters are trained in place and never rebound.
        config: what to do; see `SlowMoConfig`.
        process_set: the Horovod process set that trains together. None: all ranks.
        name: prefix of the collectives' names; a second optimizer in one process takes another.

    Raises:
        TypeError, ValueError: on every rank, if an argument is wrong on one, or settings or models differ.
    """

    _step_supports_amp_scaling = True  # see amp.py
    grad_scale: torch.Tensor | None  # set by GradScaler, during its call of step() only
    found_inf: Any

    def __init__(
        self,
        base_optimizer: Optimizer,
        model: nn.Module,
        config: SlowMoConfig,
        *,
        process_set: Any = None,
        name: str = "slowmo",
    ) -> None:
        self._setup(base_optimizer, model, config, connect(process_set), name)

    @classmethod
    def over(
        cls, comm: Comm, base_optimizer: Optimizer, model: nn.Module, config: SlowMoConfig, *, name: str = "slowmo"
    ) -> SlowMo:
        """As the constructor, over any `hvd_slowmo.comm.Comm`: workers as threads, or a transport of one's own."""
        optimizer = cls.__new__(cls)
        optimizer._setup(base_optimizer, model, config, comm, name)
        return optimizer

    def _setup(self, base_optimizer: Optimizer, model: nn.Module, config: SlowMoConfig, comm: Comm, name: str) -> None:
        self.base = base_optimizer
        self.config = config
        self._model = model
        self._comm = comm
        self._name = name
        self._averaging = False
        plan = self._agreed_plan()
        # Not Optimizer.__init__, which would make param_groups of its own: this is how unpickling sets one up.
        super().__setstate__({})
        with torch.no_grad():
            self._build(plan)
            broadcast_rest(comm, name, model, self.base, plan.layout)
            self._progress: Progress = self._machine.start()

    def _agreed_plan(self) -> Plan:
        """The layout, once all workers have compared theirs; an error on one worker is raised on all."""
        plan, error = None, None
        try:
            _check_arguments(self.base, self._model, self.config, self._name)
            plan = lay_out(self._model, self.base, self.config)
            if self.config.buffers == "reset" and self.config.tau is not None:
                base_state.fresh(self.base)  # raises now rather than at the end of the first block
        except (TypeError, ValueError) as caught:
            error = caught
        facts = {} if plan is None else {"config": _facts(self.config), "parameters": plan.layout.describe()}
        remarks = {"PyTorch": torch.__version__, "the base optimizer": type(self.base).__name__}
        try:
            agree(self._comm, self._name, facts, remarks, None if error is None else str(error))
        except ValueError as raised:
            raise (raised if error is None else error) from None
        assert plan is not None, "agree() raises where a plan is missing"
        return plan

    def _build(self, plan: Plan) -> None:
        self._store = TorchStore(plan, self.base, self.config.vectors)
        ops = EagerOps(torch.from_numpy, lambda tensor: tensor.numpy())
        self._machine = Machine(self.config, plan.layout, ops, self._store, self._comm, self._name)

    # The base optimizer's own, looked up at every use: load_state_dict replaces them.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    @property
    def steps(self) -> int:
        """Inner steps completed since construction, or since the run that was resumed began."""
        return int(self._progress.step)

    def __repr__(self) -> str:
        return f"SlowMo({self.base!r}, {self.config!r})"

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One inner step of the base optimizer; the outer step where it is due.

        Args:
            closure: as in torch.optim: reevaluates the model and returns the loss.

        Returns:
            What the base optimizer's step returns.

        Raises:
            ValueError: on every rank at an outer step, if on one of them parameters or learning rates are not finite
                or the ranks have not made the same number of steps; nothing is written then.
            horovod.common.exceptions.HorovodInternalError: another worker is gone; end this one.
        """
        if self._averaging:
            raise RuntimeError("step() within averaged_parameters(): the parameters there are not this worker's own.")
        rates = np.array([float(group["lr"]) for group in self.param_groups])
        if self._machine.plan(self._progress).average_gradients:
            closure = self._averaged(closure)
        if hasattr(self, "found_inf"):
            loss = scaled_step(self.base, self.grad_scale, self.found_inf)
        else:
            loss = self.base.step() if closure is None else self.base.step(closure)
        with torch.no_grad():
            self._progress = self._machine.tick(self._progress, rates)
        return loss

    def _averaged(self, closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        """Average the gradients: the present ones, or those of every call of the closure."""
        if closure is None:
            with torch.no_grad():
                self._machine.average_gradients()
            return None

        def evaluate() -> Any:
            loss = closure()
            with torch.no_grad():
                self._machine.average_gradients()
            return loss

        return evaluate

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Within it the model holds the workers' mean, statistics included; afterwards each has its own back.

        A collective: every rank enters it, after the same step. The copy of the own values takes the model's size in
        memory.

        Raises:
            ValueError: on every rank, if one is elsewhere or its parameters are not finite.
        """
        own = {key: tensor.detach().clone() for key, tensor in self._tensors()}
        with torch.no_grad():
            self._machine.average(self._progress)
        self._averaging = True
        try:
            yield
        finally:
            self._averaging = False
            with torch.no_grad():
                for key, tensor in self._tensors():
                    tensor.copy_(own[key])

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._model.named_parameters()
        yield from self._model.named_buffers()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, at any time. A collective: all workers get rank 0's values of it.

        Within a block the group counts as if it had been there, at its present rate, since the block began.
        """
        self.base.add_param_group(param_group)
        before, progress = self._store, self._progress
        plan = self._agreed_plan()
        added = self.base.param_groups[-1]
        with torch.no_grad():
            mine = [p.detach().cpu() for p in added["params"]] if self._comm.rank == 0 else None
            for p, value in zip(added["params"], self._comm.gather(f"{self._name}.group", mine)[0], strict=True):
                p.copy_(value)
            self._build(plan)
            self._store.adopt(before)
        elapsed = block_position(self.config, progress.step)
        self._progress = progress._replace(
            rates=np.append(progress.rates, elapsed * float(added["lr"])), gamma=np.append(progress.gamma, 0.0)
        )

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict with one more entry, "slowmo". No communication; tensors are references.

        A state from right after an outer step is common: rank 0's serves every rank. Any other is this rank's own,
        and a resume that is bitwise the run without a stop means each rank its own.
        """
        own = checkpoint.pack(self.config, self._machine.layout, self._comm, self._progress, self._store.vectors)
        return {**self.base.state_dict(), checkpoint.KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state; the given dict is not changed. No communication.

        The model's own state is loaded by its own load_state_dict, after SlowMo is constructed: construction gives
        every rank the parameters of rank 0.

        Raises:
            ValueError: it does not fit; nothing was changed. See `hvd_slowmo_torch.checkpoint.check`.
        """
        saved = checkpoint.check(state_dict, self.config, self._machine.layout, self._comm)
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != checkpoint.KEY})
        with torch.no_grad():
            self._progress = checkpoint.restore(saved, self._progress, self._store.vectors)


def _check_arguments(base: Any, model: Any, config: Any, name: Any) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"`base_optimizer` must be a torch.optim.Optimizer. Received: {type(base).__name__}")
    if isinstance(base, SlowMo):
        raise TypeError("`base_optimizer` is a SlowMo optimizer already. Wrap the optimizer that it wraps.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module. Received: {type(model).__name__}")
    if not isinstance(config, SlowMoConfig):
        raise TypeError(f"`config` must be a SlowMoConfig. Received: {type(config).__name__}")
    if not isinstance(name, str) or not name:
        raise TypeError(f"`name` must be a string that is not empty. Received: {name!r}")


def _facts(config: SlowMoConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)
