"""One worker's part of a SlowMo optimizer, apart from torch.optim: its connections, its position and its steps.

All that changes lives in this one object. Wrappers such as Lightning's copy an optimizer's attributes; the copies share
it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from hvd_slowmo.comm.failure import tell_steps
from hvd_slowmo.comm.launcher import elastic
from hvd_slowmo.comm.naming import distinct_name
from hvd_slowmo.comm.protocol import Comm, ScopedComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.layout import CHUNK_BYTES, ParameterGroups
from hvd_slowmo.core.parts.outer_update import Kernels
from hvd_slowmo.core.parts.progress import Progress, Scalar
from hvd_slowmo.core.parts.roll_call import RollCall
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.parts.schedule import StepPlan
from hvd_slowmo.core.parts.slices import OwnSlices
from hvd_slowmo.core.parts.whole import Whole, gather_whole
from hvd_slowmo.core.regroup.member import BrokenOff
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.core.step import refusals
from hvd_slowmo.core.step.assembly import Assembly, assemble
from hvd_slowmo.core.step.metrics import Metrics
from hvd_slowmo.core.step.outer_log import OuterStepLog
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_torch.checkpoint import TorchWorkerState
from hvd_slowmo_torch.comm.meter import WorkerMeter
from hvd_slowmo_torch.inner import inner_settings
from hvd_slowmo_torch.inner.rates import UsableRates
from hvd_slowmo_torch.interop.weights import array_of
from hvd_slowmo_torch.model.gradient_hooks import GradientHooks
from hvd_slowmo_torch.model.gradients import TorchGradients
from hvd_slowmo_torch.model.layout import TensorRef, TorchLayout
from hvd_slowmo_torch.model.statistics import floating_buffers
from hvd_slowmo_torch.model.store import TorchStore
from hvd_slowmo_torch.model.watch import WatchNotes
from hvd_slowmo_torch.presence import WorkerPresence
from hvd_slowmo_torch.tensors.codec import TorchCodec
from hvd_slowmo_torch.tensors.ops import TorchOps
from hvd_slowmo_torch.tensors.outer_update import divide_, outer_update_, scaled_sum_
from hvd_slowmo_torch.tensors.streams import caller_context

# Elements of an outer update at once on a CPU: small enough for a core's cache, see benchmarks/outer_update.py.
_CACHED = 2**17


@dataclass(frozen=True)
class Settings:
    """The constructor's arguments besides optimizer, model and workers.

    Attributes:
        error: raised while `config` was made of them; the workers hear of it at the start.
    """

    config: SlowMoConfig
    name: str
    metrics: bool
    parameter_map: ParameterMap | None
    statistics: Mapping[str, bool] | None = None
    chunk_bytes: int = CHUNK_BYTES
    error: Exception | None = None


class TorchWorker:
    """Takes the steps of one worker.

    Args:
        inner: the inner optimizer.
        model: the module that is trained.
        settings: the constructor's other arguments.
        comm: the workers.

    Attributes:
        assembly: the core's parts; made in the start, and anew by add_param_group().
        progress: the scalar state.
        elastic: other workers may take the place of these, in an elastic job.
        started: the workers have been brought to one start.
        meter: of its exchanges.
        interrupted: learning rates of an inner step that has been made and is not counted, since the exchange behind it
            was broken off; None else.
        broken_off: by the loss of another worker.
        mixed: the job has workers of several frameworks.
        averaging: within averaged_parameters().
        evaluating: between eval() and train() of a schedule-free inner optimizer.
    """

    assembly: Assembly[TensorRef]
    store: TorchStore
    hooks: GradientHooks
    optimizer: Callable[[], Optimizer | None]  # a weak reference to the SlowMo optimizer
    progress: Progress
    _planned: tuple[Scalar, StepPlan]  # a step for which the worker is prepared, and its plan

    def __init__(self, inner: Optimizer, model: nn.Module, settings: Settings, comm: Comm) -> None:
        self.inner, self.model, self.settings, self.config = inner, model, settings, settings.config
        self._name = distinct_name(comm, settings.name)
        self.meter = WorkerMeter(comm)
        self.comm = ScopedComm(self.meter.comm, self._name)
        self.elastic = elastic()
        self.started = False
        self.interrupted: NDArray[np.float64] | None = None
        self.broken_off = BrokenOff()
        self.presence = WorkerPresence(inner)
        tell_steps(comm, self, TorchWorker._steps)
        self.mixed = False
        self.averaging = False
        self.evaluating = False
        self._rates = UsableRates(self.presence)
        self._log = OuterStepLog(self.config)

    if not TYPE_CHECKING:  # which would take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Say what is missing before the start, which makes everything that is looked for here."""
            if name in TorchWorker.__annotations__:
                raise RuntimeError(refusals.not_started("optimizer"))
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def assemble(self, layout: TorchLayout, groups: ParameterGroups, graph: Graph | None) -> None:
        """Make everything that a step needs; the vectors are zeros."""
        # No method: the store would keep its owner alive, and with it the hooks of an optimizer that is dropped.
        buffers = partial(floating_buffers, self.model, self.settings.statistics or {})
        on_host = self.config.slow_state == "host"
        self.store = TorchStore(layout, self.inner, self._vectors(graph), buffers, self._slices(layout), on_host)
        self._connect(layout, groups, graph)

    def connect(self, comm: Comm) -> None:
        """Go on with other workers."""
        self.meter.connect(comm)
        self.comm = ScopedComm(self.meter.comm, self._name)
        tell_steps(comm, self, TorchWorker._steps)
        self.presence.left = ()

    def reassemble(self, graph: Graph | None) -> None:
        """Make everything anew that a step needs with other workers.

        The tensors, vectors and the position stay; slices wait to be dealt anew, and of gossip nothing is left.
        """
        assembly, hooks, former = self.assembly, self.hooks, self.assembly.machine
        hooks.remove()
        self.store.divide(self._slices(assembly.layout))
        self.store.keep(self._vectors(graph))
        self._connect(assembly.layout, assembly.groups, graph)
        machine = self.assembly.machine
        machine.meetings.written, self.hooks.accumulating = former.meetings.written, hooks.accumulating
        machine.meetings.unanswered.update(former.meetings.unanswered)
        self.progress = self.progress._replace(mixing=machine.mixing.initial())

    def _steps(self) -> int | None:
        return int(self.progress.step) if self.started else None

    def _vectors(self, graph: Graph | None) -> tuple[str, ...]:
        return (*self.config.vectors, *(() if graph is None else graph.vectors))

    def _slices(self, layout: TorchLayout) -> OwnSlices:
        return OwnSlices(self.config, layout.layout, self.comm.rank, self.comm.size)

    def _connect(self, layout: TorchLayout, groups: ParameterGroups, graph: Graph | None) -> None:
        """Make everything that works on the store and among the present workers."""
        self._resets = self.config.resets_inner_state
        devices = [torch.device(segment.device) for segment in layout.layout.segments]
        on_cpu = all(device.type == "cpu" for device in devices)
        runtime = Runtime(
            self.config,
            layout.layout,
            TorchOps(devices),
            self.store,
            self.comm,
            Kernels(outer_update_, divide_, scaled_sum_, _CACHED if on_cpu else None),
            self.settings.metrics,
            codec=TorchCodec(),
        )
        self.assembly = assemble(runtime, layout, groups, graph)
        self.assembly.machine.meetings.tracks = self.elastic
        me = weakref.ref(self)  # the machine must not keep its owner alive

        def keep(progress: Progress) -> None:
            worker = me()
            if worker is not None:
                worker.progress = progress

        self.assembly.machine.keep = self.assembly.machine.undone = keep
        self.presence.groups = groups
        self.hooks = GradientHooks(self.assembly.averages, TorchGradients(layout, self.store.watch), self.presence)

    def prepare(self) -> None:
        """Get ready for the coming step."""
        self._planned = self.progress.step, self.assembly.machine.plan(self.progress)
        self.hooks.prepare(self._planned[1])

    def take_over(self, progress: Progress, notes: WatchNotes | None = None) -> None:
        """Go on from this position; the vectors have their values already.

        Args:
            notes: of the model's watch, where the position was loaded.
        """
        self.assembly.machine.discard_in_flight()
        self.store.watch.resume(notes)
        self.progress = progress
        self.prepare()

    def step(self, take_inner_step: Callable[[], Any]) -> Any:
        """Take one inner step, and the outer step where it is due; return the result of `take_inner_step`.

        Gradients have been averaged before, where the step averages them.
        """
        machine, averages, watch = self.assembly.machine, self.assembly.averages, self.store.watch
        before = self.progress.observed
        step, plan = self._planned
        if step != self.progress.step:  # a join has moved it
            plan = machine.plan(self.progress)
        if plan.outer or plan.mix or plan.check or plan.lands:
            self.presence.refuse_if_left()
        several = self.comm.size > 1
        rates, usable = self._rates.look(self.comm.name, meets=several and bool(plan.outer or self.config.tau))
        watch.look(mixes=several and bool(plan.mix))
        usable = usable and watch.fits
        try:
            if averages.ever and averages.of_all.entered.get():
                with torch.no_grad():
                    averages.level()
            result = None
            if usable:
                with inner_settings.watched(self.inner, resets=self._resets):
                    result = take_inner_step()
            elif self.hooks.missing:  # a closure would have averaged gradients, as it does on the others
                self.hooks.average()
            if plan.eventful:
                self._after_inner_step(rates)
            else:  # the common step: it costs microseconds
                self.progress = machine.count(self.progress, rates)
        finally:
            self.prepare()
        if self.settings.metrics and self.progress.observed is not before:  # an outer step has been applied
            self.meter.measure(self.progress)
        if plan.outer or plan.lands:
            self._log.look(
                self.comm, lambda: int(self.progress.step), lambda: (self.meter.bytes_sent, self.meter.metrics)
            )
        return result

    def finish_step(self) -> None:
        """Take what follows an inner step and was broken off, with other workers."""
        assert self.interrupted is not None, "else there is nothing to finish"
        self._after_inner_step(self.interrupted)

    def _after_inner_step(self, rates: NDArray[np.float64]) -> None:
        before = self.progress.step
        try:
            with torch.no_grad():
                self.progress = self.assembly.machine.after_inner_step(
                    self.progress,
                    rates,
                    training=int(not self.presence.joining),
                    catch_up_from=self.hooks.catch_up_from,
                )
        except RuntimeError:  # of a transport; the verdict's is a ValueError
            self.interrupted = rates if self.progress.step == before else None
            raise
        self.interrupted = None

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all parameters and buffers of the model by name."""
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()

    def caller_context(self) -> AbstractContextManager[None]:
        """Return a context, to be entered in another thread, with this thread's CUDA device and streams."""
        return caller_context(torch.device(segment.device) for segment in self.assembly.layout.layout.segments)

    def complete(self) -> None:
        """Apply what is in flight, to the parameters that are trained. A collective."""
        evaluating = self.evaluating and bool(self.progress.flight.launched.any())
        if evaluating:
            self.switch("train")
        try:
            with torch.no_grad():
                self.progress = self.assembly.machine.complete(self.progress)
        finally:
            if evaluating:
                self.switch("eval")

    @contextmanager
    def holding_mean(self) -> Iterator[None]:
        """Let the model hold the workers' mean within, and its own values afterwards. A collective."""
        self.complete()
        own = {name: tensor.detach().clone() for name, tensor in self.tensors()}
        self.averaging = True
        try:
            with torch.no_grad():
                self.assembly.machine.average(self.progress)
            yield
        finally:
            self.averaging = False
            with torch.no_grad():
                for name, tensor in self.tensors():
                    if not torch.equal(tensor, own[name]):  # what stays untouched is not taken for a change
                        tensor.copy_(own[name])

    def averaged_ids(self) -> set[int]:
        """Return ids of the tensors that are averaged without being trained."""
        return {id(ref.find()) for ref in self.assembly.layout.refs_of("statistic")}

    def switch(self, mode: str) -> Any:
        """Call `train()` or `eval()` of a schedule-free inner optimizer, which writes other values to the parameters.

        These are no values from outside, and neither are those that train() brings back, rounded.
        """
        self.refuse_while_averaging(f"{mode}()")
        with self.store.watch.expecting_writes():
            result = getattr(self.inner, mode)()
        self.evaluating = mode == "eval"
        return result

    def refuse_elsewhere(self, what: str) -> None:
        """Raise RuntimeError where the model does not hold the parameters that this worker trains."""
        self.refuse_while_averaging(what)
        if self.evaluating:
            raise RuntimeError(
                f"{what} after eval(): the parameters are those to evaluate, not those that are trained. Call "
                "optimizer.train() first."
            )

    def refuse_while_averaging(self, what: str) -> None:
        """Raise RuntimeError within averaged_parameters()."""
        refusals.refuse_while_averaging(self.averaging, what)

    @property
    def roll(self) -> RollCall:
        """The knowledge about all workers."""
        return self.assembly.runtime.roll

    def state_maker(self, parameter_map: ParameterMap | None = None) -> Callable[[], TorchWorkerState]:
        """Return a function that returns this worker's state for a save. A collective."""
        self.presence.refuse_if_left()
        with torch.no_grad():
            whole = gather_whole(self.assembly.runtime, array_of)
        return lambda: self.state(parameter_map, whole)

    def state(self, parameter_map: ParameterMap | None, whole: Whole | None = None) -> TorchWorkerState:
        """Return this worker's state for checkpoints.

        Args:
            parameter_map: None for the optimizer's own.
            whole: vectors that are kept in slices, for a save.
        """
        self.refuse_elsewhere("save() or load()")
        names = parameter_map or self.settings.parameter_map
        return TorchWorkerState(self.model, self.inner, self.assembly, self.progress, names, self.take_over, whole)

    def metrics(self) -> Metrics | None:
        """Return the measurements of the last outer step; None before the first one.

        Raises:
            RuntimeError: nothing is measured.
        """
        refusals.refuse_unmeasured(self.settings.metrics)
        return self.meter.metrics
