"""SlowMo as a torch.optim.Optimizer around any other."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from hvd_slowmo.checkpoint import job as snapshot
from hvd_slowmo.checkpoint.inner_state import Carried
from hvd_slowmo.comm.protocol import Comm, MeteredComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.gradient_average import Attendance, GradientMean
from hvd_slowmo.core.handshake import agreed
from hvd_slowmo.core.join import Joined, catch_up, take_part
from hvd_slowmo.core.machine import Machine
from hvd_slowmo.core.metrics import Metrics, metrics_of
from hvd_slowmo.core.mixing import Graph, agreed_graph
from hvd_slowmo.core.ops import EagerOps
from hvd_slowmo.core.progress import Observed, Progress
from hvd_slowmo.core.startup import Groups, Position, facts_of, meet
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo.wire.tensors import TensorSpec
from hvd_slowmo_torch import state_dict as checkpoint
from hvd_slowmo_torch.amp import scaled_step
from hvd_slowmo_torch.checkpoint import TorchSide
from hvd_slowmo_torch.checks import check_base, check_types
from hvd_slowmo_torch.fast import outer_update_
from hvd_slowmo_torch.gradient_hooks import BackwardMean
from hvd_slowmo_torch.horovod import workers
from hvd_slowmo_torch.layout import Plan, entries_of, groups_of, lay_out
from hvd_slowmo_torch.startup import hand_out_rest, hand_over
from hvd_slowmo_torch.store import TorchStore

# Elements of an outer update at once on a CPU: small enough for a core's cache, see benchmarks/outer_update.py.
_CACHED = 2**17


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
        metrics: measure at every outer step what `metrics()` tells; costs about as much as the outer update itself.
        parameter_map: train together with workers of another framework: which parameter is which there. Every worker
            gives the same one; `ParameterMap()` for models with the same layers in the same order.

    Raises:
        TypeError, ValueError: on every rank, if an argument is wrong on one, or settings or models differ.
    """

    _step_supports_amp_scaling = True  # see amp.py
    _attendance: Attendance
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
        metrics: bool = False,
        parameter_map: ParameterMap | None = None,
    ) -> None:
        node: Comm | None = None
        if isinstance(config, SlowMoConfig) and config.gradients == "node":
            if process_set is not None:
                raise ValueError("gradients='node' works on all ranks only: give no process_set.")
            node = workers.connect_node()
        comm = workers.connect(process_set)
        self._setup(base_optimizer, model, config, comm, node, name, metrics, parameter_map)

    @classmethod
    def over(
        cls,
        comm: Comm,
        base_optimizer: Optimizer,
        model: nn.Module,
        config: SlowMoConfig,
        *,
        node: Comm | None = None,
        name: str = "slowmo",
        metrics: bool = False,
        parameter_map: ParameterMap | None = None,
    ) -> SlowMo:
        """As the constructor, over any `Comm`: workers as threads, or a transport of one's own.

        node: the workers of this one's node, for gradients="node".
        """
        optimizer = cls.__new__(cls)
        optimizer._setup(base_optimizer, model, config, comm, node, name, metrics, parameter_map)
        return optimizer

    def _setup(
        self,
        base_optimizer: Optimizer,
        model: nn.Module,
        config: SlowMoConfig,
        comm: Comm,
        node: Comm | None,
        name: str,
        metrics: bool,
        parameter_map: ParameterMap | None,
    ) -> None:
        self.base = base_optimizer
        self.config = config
        self._model = model
        self._comm = MeteredComm(comm)
        self._node = None if node is None else MeteredComm(node)
        self._observing = metrics
        self._metrics: Metrics | None = None
        self._sent_before, self._waited_before = 0, 0.0
        self._name = name
        self._map = parameter_map
        self._averaging = False  # within averaged_parameters()
        self._joining = self._leaving = 0  # within join(), within join(leaving=True)
        self._left: tuple[int, ...] = ()  # ranks that have left for good
        self._source = 0  # a worker that took part in the last exchange of gradients
        self._uneven = False  # whether one did not, which was in its join
        self._graph: Graph | None = None  # over a gossip base
        self._carried = Carried()  # of the checkpoint that was loaded last
        entries, self._groups, plan = self._agreed_plan()
        if config.base != "local":
            self._graph = agreed_graph(config, comm, node, name)
        job = meet(comm, name, Position("PyTorch", 0, 0, self._groups.of))
        self._mixed = job.mixed
        if parameter_map is not None:
            self._groups = job.groups
            plan = lay_out(model, self.base, config, entries, self._groups)
        # Not Optimizer.__init__, which would make param_groups of its own: this is how unpickling sets one up.
        super().__setstate__({})
        with torch.no_grad():
            self._build(plan)
            hand_out_rest(comm, name, job, model, self.base, entries)
            self._progress: Progress = self._machine.start()
        self._prepare()

    def _agreed_plan(self, group: dict[str, Any] | None = None) -> tuple[list[TensorSpec], Groups, Plan]:
        """What travels, once all workers have compared theirs; an error on one worker is raised on all.

        group: to add to the base optimizer first.
        """

        def make() -> tuple[tuple[list[TensorSpec], Groups, Plan], dict[str, Any]]:
            if group is not None:
                self.base.add_param_group(group)
            check_types(self.base, self._model, self.config, self._name, self._map)
            entries = entries_of(self._model, self.base, self._map)
            groups = groups_of(entries, self._model, self.base)
            plan = lay_out(self._model, self.base, self.config, entries, groups)
            check_base(self.base, self.config)
            return (entries, groups, plan), facts_of(self.config, "PyTorch", self._map, entries, plan.layout)

        remarks = {"PyTorch": torch.__version__, "the base optimizer": type(self.base).__name__}
        return agreed(self._comm, self._name, make, remarks)

    def _build(self, plan: Plan) -> None:
        vectors = self.config.vectors if self._graph is None else (*self.config.vectors, *self._graph.vectors)
        self._plan = plan
        self._store = TorchStore(plan, self.base, vectors)
        self._ops = ops = EagerOps(torch.from_numpy, lambda tensor: tensor.numpy())
        on_cpu = all(segment.device == "cpu" for segment in plan.layout.segments)
        self._machine = Machine(
            self.config,
            plan.layout,
            ops,
            self._store,
            self._comm,
            self._name,
            observe=self._observing,
            block=_CACHED if on_cpu else None,
            update=outer_update_,
            graph=self._graph,
            divide=operator.itruediv,  # the sum is not needed any more
        )
        self._of_all = GradientMean(plan.layout, ops, self._store, self._comm, self._name)
        self._of_node = self._of_all
        if self._node is not None:
            self._of_node = GradientMean(plan.layout, ops, self._store, self._node, self._name)
        self._gradients = BackwardMean(
            self._of_all, self._store, self._refuse_if_left, self._send_rest, self._finish_gradients
        )

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

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "SlowMo can't be pickled or deep-copied: it holds connections to the other workers and hooks on its model. "
            "Copy state_dict() instead."
        )

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
        self._refuse_within_average("step()")
        now = self._machine.plan(self._progress)
        if now.outer or now.mix or now.check:
            self._refuse_if_left()
        rates = self._rates()
        if self._gradients.due and not self._gradients.done:
            if closure is not None:
                closure = self._averaged(closure)
            elif hasattr(self, "found_inf"):
                raise RuntimeError(
                    "the scaler has looked at gradients that no backward has averaged yet. Under a GradScaler, leave "
                    "one backward of every step outside of no_sync()."
                )
            else:
                self._average_gradients()  # they come from elsewhere, or from no_sync() alone
        try:
            loss = self._base_step(closure)
            with torch.no_grad():
                live, source = 1 - self._joining, self._source
                self._progress = self._machine.tick(self._progress, rates, live, source)
        finally:
            self._prepare()
        if self._observing and now.outer:
            self._measure()
        return loss

    def _base_step(self, closure: Callable[[], Any] | None) -> Any:
        if not hasattr(self, "found_inf"):
            return self.base.step() if closure is None else self.base.step(closure)
        try:
            return scaled_step(self.base, self.grad_scale, self.found_inf)
        except Exception:
            del self.found_inf, self.grad_scale  # the scaler does that only if all goes well
            raise

    def _refuse_if_left(self) -> None:
        if self._left:
            raise RuntimeError(f"ranks {list(self._left)} have left in join(leaving=True): nothing can be averaged.")

    def _refuse_within_average(self, what: str) -> None:
        if self._averaging:
            raise RuntimeError(f"{what} within averaged_parameters(): the parameters there are not this worker's own.")

    @property
    def bytes_sent(self) -> int:
        """Bytes that this worker has handed to Horovod for sums since construction (not what a ring makes of them)."""
        return self._comm.bytes_sent + (0 if self._node is None else self._node.bytes_sent)

    def metrics(self) -> Metrics | None:
        """What the last outer step measured; None before the first one. Alike on all workers but for the last two.

        Raises:
            RuntimeError: constructed without metrics=True.
        """
        if not self._observing:
            raise RuntimeError("nothing is measured: construct SlowMo(..., metrics=True)")
        return self._metrics

    def _measure(self) -> None:
        waited = self._comm.seconds_waited + (0.0 if self._node is None else self._node.seconds_waited)
        seen = Observed(*self._progress.observed.tolist())
        self._metrics = metrics_of(seen, self.steps, waited - self._waited_before, self.bytes_sent - self._sent_before)
        self._waited_before, self._sent_before = waited, self.bytes_sent

    def _rates(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """One for each group that all workers have in common."""
        return np.array([float(self.param_groups[own]["lr"]) for own in self._groups.own])

    def _averaged(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, with gradients averaged also where it makes them without backward."""

        def evaluate() -> Any:
            loss = closure()
            if not self._gradients.done:
                self._average_gradients()
            return loss

        return evaluate

    def _average_gradients(self) -> None:
        """Those of a step whose gradients no backward has averaged."""
        with torch.no_grad():
            self._send_rest()
            self._finish_gradients()

    def _send_rest(self) -> None:
        self._refuse_if_left()
        self._gradients.exchange.send_rest(1 - self._joining, self._leaving, self._rates())

    def _finish_gradients(self) -> None:
        exchange = self._gradients.exchange
        self._attendance = exchange.finish()
        if self._attendance.live:
            self._source = int(self._attendance.source)
            self._uneven = self._uneven or self._attendance.live < exchange.size
        self._gradients.done = True

    def _prepare(self) -> None:
        """Look at the coming step."""
        now = self._machine.plan(self._progress)
        exchange = self._of_all if now.all_gradients else self._of_node
        if exchange is not self._gradients.exchange:
            self._gradients.exchange, self._source, self._uneven = exchange, 0, False
        self._gradients.due = bool(now.average_gradients) and exchange.size > 1
        self._gradients.done = False
        if self._gradients.due:
            self._gradients.register()
        else:
            self._gradients.remove()

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradient accumulation: within it backward does not average gradients over the workers.

        Where gradients are averaged (gradients="all", warm-up), there is one exchange per step: at the first backward
        outside of no_sync(), of all that has been accumulated.
        """
        return self._gradients.accumulate()

    def join(self, *, leaving: bool = False, scaler: torch.amp.GradScaler | None = None) -> Joined:
        """Wait for workers with more data, and leave all with the workers' mean. A collective.

        At the end of an epoch, before evaluating and before saving on rank 0. Until all workers are in their join,
        this one takes part in the others' exchanges. The mean weighs a worker by the steps that it took since the last
        average; where a block has just ended on all, nothing changes, to the bit. Afterwards all workers hold the same
        parameters, statistics, anchor and momentum, at the step of the one with the most steps.

        Args:
            leaving: this worker stops for good; the others find its rank in `Joined.left`.
            scaler: the GradScaler, needed where gradients are averaged under one.

        Returns:
            By how many steps this worker was behind (for a scheduler that counts steps), and who has left.

        Raises:
            ValueError: as in step(), on every rank.
        """
        self._refuse_within_average("join()")
        self._refuse_if_left()
        if self._comm.size == 1:
            return Joined(0, self._comm.ranks if leaving else ())
        before = self.steps
        self._joining, self._leaving = 1, int(leaving)
        try:
            left = take_part(
                self._ops,
                lambda node_done: self._gradients.due and not node_done,
                partial(self._join_gradients, scaler),
                self._join_block,
                np.zeros(self._comm.size),
            )
        finally:
            self._joining = self._leaving = 0
            self._prepare()
        self._left = tuple(rank for rank, gone in zip(self._comm.ranks, left, strict=True) if gone)
        return Joined(self.steps - before, self._left)

    @torch.no_grad()
    def _catch_up(self, comm: Comm | None) -> None:
        assert comm is not None, "gradients='node' comes with the node's workers"
        everyone = self._gradients.exchange is self._of_all
        # What base optimizers keep has no form in common with another framework's.
        state = None if self._mixed else partial(hand_over, comm, self._name, self._source, self.base)
        catch_up(self._machine, self._ops, comm, self._uneven, self._source, everyone, state)
        self._uneven = False

    @torch.no_grad()
    def _join_block(self) -> tuple[bool, Any]:
        self._progress, over, left = self._machine.idle(self._progress, self._leaving)
        return not over, left

    def _join_gradients(self, scaler: torch.amp.GradScaler | None, left: Any) -> tuple[bool, bool, Any]:
        """Give zeros, and take the step that the others take, with their gradients and their rates."""
        self.zero_grad()
        self._average_gradients()
        if not self._attendance.live:
            everyone = self._gradients.exchange is self._of_all
            self._catch_up(self._comm if everyone else self._node)
            return (False, False, self._attendance.leaving) if everyone else (True, True, left)
        own = [group["lr"] for group in self.param_groups]
        for number, group in enumerate(self.param_groups):
            common = self._groups.common(number)
            rate = group["lr"] if common is None else self._attendance.rates[common]
            group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], torch.Tensor) else float(rate)
        try:
            if scaler is None:
                self.step()
            else:
                scaler.scale(torch.zeros((), device=self.param_groups[0]["params"][0].device))  # makes its first scale
                scaler.step(self)
                scaler.update()
        finally:
            for group, rate in zip(self.param_groups, own, strict=True):
                group["lr"] = rate
        self.zero_grad()
        return True, False, left

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Within it the model holds the workers' mean, statistics included; afterwards each has its own back.

        A collective: every rank enters it, after the same step. The copy of the own values takes the model's size in
        memory.

        Raises:
            ValueError: on every rank, if one is elsewhere or its parameters are not finite.
        """
        self._refuse_within_average("averaged_parameters()")
        self._refuse_if_left()
        own = {key: tensor.detach().clone() for key, tensor in self._tensors()}
        self._averaging = True
        try:
            with torch.no_grad():
                self._machine.average(self._progress)
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

        Raises:
            ValueError: over a gossip base, between averages: weights and messages there belong to the parameters that
                have been mixed so far. With a parameter_map: workers of another framework can't follow.
        """
        if self._map is not None:
            raise ValueError(
                "with a parameter_map no parameters can be added: workers of another framework can't follow. Give the "
                "base optimizer all of them before SlowMo is constructed."
            )
        self._refuse_within_average("add_param_group()")
        self._refuse_if_left()
        if self._machine.midway(self._progress):
            raise ValueError(
                "parameters can't be added while messages are on their way or push-sum weights differ from 1. Add them "
                "before the first step, or right after join() or an outer step."
            )
        before, progress, groups = self._store, self._progress, len(self.param_groups)
        try:
            _, self._groups, plan = self._agreed_plan(param_group)
        except Exception:
            del self.param_groups[groups:]
            raise
        added = self.base.param_groups[-1]
        with torch.no_grad():
            mine = [p.detach().cpu() for p in added["params"]] if self._comm.rank == 0 else None
            for p, value in zip(added["params"], self._comm.gather(f"{self._name}.group", mine)[0], strict=True):
                p.copy_(value)
            accumulating = self._gradients.accumulating
            self._gradients.remove()
            self._build(plan)
            self._gradients.accumulating = accumulating
            self._store.adopt(before)
        self._progress = progress._replace(
            rates=np.append(progress.rates, progress.covered * float(added["lr"])),
            gamma=np.append(progress.gamma, 0.0),
        )
        self._prepare()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict with one more entry, "slowmo". No communication; tensors are references.

        A state from right after an outer step or a join is common: rank 0's serves every rank. Any other is this
        rank's own, and a resume that is bitwise the run without a stop means each rank its own.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        own = checkpoint.pack(self.config, self._machine.layout, self._comm, self._progress, self._store.vectors)
        state = {**self.base.state_dict(), checkpoint.KEY: own}
        for after in self._optimizer_state_dict_post_hooks.values():
            state = _given(after(self, state), state)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state; the given dict is not changed. No communication.

        The model's own state is loaded by its own load_state_dict, after SlowMo is constructed: construction gives
        every rank the parameters of rank 0.

        Raises:
            ValueError: it does not fit; nothing was changed. See `hvd_slowmo_torch.state_dict.check`.
        """
        self._refuse_within_average("load_state_dict()")
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _given(before(self, state_dict), state_dict)
        saved = checkpoint.check(state_dict, self.config, self._machine.layout, self._comm)
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != checkpoint.KEY})
        with torch.no_grad():
            self._settle(checkpoint.restore(saved, self._store.vectors))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def save(self, path: snapshot.AnyPath, *, parameter_map: ParameterMap | None = None) -> None:
        """Write the whole job's state, the model's included, to a file that Keras can read too. A collective.

        docs/checkpoints.md says what is in the files. `load` on as many workers is a resume to the bit.

        Args:
            path: the same on every rank, in a folder that all ranks see. What only one rank has goes beside it.
            parameter_map: None for the optimizer's own, the automatic one or, where there is none, PyTorch's own names,
                which Keras can't read.

        Raises:
            ValueError: on every rank, if one can't save or the ranks are not at the same step; a checkpoint that was
                there before is whole then.
        """
        self._refuse_if_left()
        snapshot.save(lambda: self._side(parameter_map), self._comm, self._name, path)

    def load(self, path: snapshot.AnyPath, *, parameter_map: ParameterMap | None = None) -> None:
        """Continue from a checkpoint of `save`, of either framework: the model's values too. A collective.

        Raises:
            ValueError: on every rank, if a file is damaged or does not fit on one; nothing was changed.
        """
        self._refuse_if_left()

        def side() -> TorchSide:
            gossip = self._machine.gossip
            if self._mixed and gossip is not None and gossip.under_way:
                # Keras sends in its next step, and after a load that is another message.
                raise ValueError(
                    "this worker's messages are on their way, and those of Keras workers are not yet. In a job of both "
                    "frameworks over OSGP, call join() on every worker before load()."
                )
            return self._side(parameter_map)

        snapshot.load(side, self._comm, self._name, path)

    def _side(self, parameter_map: ParameterMap | None) -> TorchSide:
        self._refuse_within_average("save() or load()")
        return TorchSide(
            self._model,
            self.base,
            self.config,
            self._plan,
            self._groups,
            self._store.vectors,
            self._progress,
            None if self._graph is None else self._graph.digest,
            self._carried,
            parameter_map or self._map,
            self._settle,
        )

    def _settle(self, progress: Progress) -> None:
        """Go on from this position: the vectors are there already."""
        self._machine.recall()
        self._progress = progress
        self._prepare()


def _given(result: dict[str, Any] | None, state: dict[str, Any]) -> dict[str, Any]:
    """What a hook on a state_dict leaves: what it returns, or the state that it may have changed in place."""
    return state if result is None else result
