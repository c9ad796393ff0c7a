"""SlowMo as a torch.optim.Optimizer around any other."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from hvd_slowmo.checkpoint import job as checkpoint
from hvd_slowmo.comm.launcher import elastic
from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.layout import CHUNK_BYTES
from hvd_slowmo.core.regroup.join import JoinResult
from hvd_slowmo.core.start.arguments import Outermost, check_name, check_workers, refuse_in_elastic_job
from hvd_slowmo.core.start.handshake import RESTART_FACT, agree
from hvd_slowmo.core.start.startup import start
from hvd_slowmo.core.step import preemption
from hvd_slowmo.core.step.metrics import Metrics
from hvd_slowmo.settings import SlowMoSettings
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_torch import state_dict as slowmo_state
from hvd_slowmo_torch.callers import initializes_state, refuse_foreign_checkpoints
from hvd_slowmo_torch.checkpoint import TorchWorkerState
from hvd_slowmo_torch.checks import check_types, refuse_without_model, try_configured
from hvd_slowmo_torch.comm.workers import Transport, connect
from hvd_slowmo_torch.inner.inner_optimizer import scaled_step
from hvd_slowmo_torch.inner.saved_inner import marked
from hvd_slowmo_torch.join import take_part_in_join
from hvd_slowmo_torch.param_groups import add_param_group
from hvd_slowmo_torch.startup import StartingTorchWorker
from hvd_slowmo_torch.step_hooks import hooked_at_need
from hvd_slowmo_torch.worker import Settings, TorchWorker


class SlowMo(Outermost, Optimizer):
    """Slow momentum (Wang et al., ICLR 2020, arXiv 1910.00643, Algorithm 1) around an inner optimizer.

    A torch.optim.Optimizer: `param_groups`, `state` and `defaults` are the inner optimizer's own, so schedulers,
    clipping and everything else that looks at them works on either. Every `step()` is one inner step; every
    `config.tau` of them the workers average their parameters and take a momentum step.

    Construction is a collective: every rank constructs it at the same place. The workers compare their settings and
    models; then all get rank 0's parameters, buffers and inner optimizer state.

    Args:
        inner_optimizer: any torch.optim.Optimizer over parameters of `model`.
        model: the module that is trained; its parameters are trained in place and never rebound.
        config: the settings; None for SlowMoConfig's defaults, or for its fields as keywords: SlowMo(..., tau=12).
        process_set: the Horovod process set that trains together; None for all ranks.
        process_group: the group of torch.distributed that trains together; None for all ranks.
        transport: "horovod" or "torch"; None for the one that is initialized.
        comm: the workers, in place of these: threads of one process, or another transport. With gradients="node" it
            brings its node's workers as `comm.node`.
        name: prefix of the collectives' names; a second optimizer in one process takes another.
        metrics: measure at every outer step, for `metrics()`; costs about as much as the outer update itself.
        parameter_map: names of the tensors in other frameworks, to train together with their workers. Every worker
            gives the same one; `ParameterMap()` for models with the same layers in the same order.
        statistics: tensors that are not trained, by patterns of their names (as in `fnmatch`), and whether outer steps
            and joins average them. Without it, floating-point buffers are averaged and parameters that are not trained
            are not: `{"queue": False, "teacher.*": True}`.

    Attributes:
        inner_optimizer: as given.
        config: as given.
        worker: this worker's part apart from torch.optim; internal.

    Raises:
        TypeError, ValueError: on every rank, if an argument is wrong on one, or settings or models differ.

    Example:
        >>> import hvd_slowmo.torch as slowmo
        >>> model = torch.nn.Linear(3, 1)
        >>> inner = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = slowmo.SlowMo(inner, model, slowmo.SlowMoConfig(tau=2))
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 3)).mean().backward()
        ...     optimizer.step()
        >>> optimizer.steps
        4
    """

    _step_supports_amp_scaling = True  # see inner_optimizer.py
    _chunk_bytes = CHUNK_BYTES  # the greatest length of a message; tests shorten it
    grad_scale: torch.Tensor | None  # set by GradScaler, during its call of step() only
    found_inf: Any

    def __new__(cls, *arguments: Any, **options: Any) -> SlowMo:
        refuse_without_model(SlowMo, arguments, options)
        return super().__new__(cls)

    def __init__(
        self,
        inner_optimizer: Optimizer,
        model: nn.Module,
        config: SlowMoConfig | None = None,
        *,
        process_set: Any = None,
        process_group: Any = None,
        transport: Transport | None = None,
        comm: Comm | None = None,
        name: str = "slowmo",
        metrics: bool = False,
        parameter_map: ParameterMap | None = None,
        statistics: Mapping[str, bool] | None = None,
        **settings: Unpack[SlowMoSettings],
    ) -> None:
        config, error = try_configured(SlowMo, config, settings)
        check_name(name)  # of the collectives: under another one this worker could not tell the others
        check_workers(config, comm, process_set=process_set, process_group=process_group, transport=transport)
        deferred = comm is None and elastic()  # until all workers come together, see elastic.py
        if deferred:
            given = {"process_set": process_set, "process_group": process_group}
            given["transport"] = None if transport == "horovod" else transport
            refuse_in_elastic_job(config, parameter_map, **given)
        if comm is None:
            comm = connect(process_set, process_group, transport, node=config.gradients == "node")
        others = Settings(config, name, metrics, parameter_map, statistics, self._chunk_bytes, error)
        self.inner_optimizer = inner_optimizer
        self.config = config
        self.worker = TorchWorker(inner_optimizer, model, others, comm)
        self.worker.optimizer = weakref.ref(self)
        if deferred:
            check_types(inner_optimizer, model, others)
        else:
            start(StartingTorchWorker(self.worker), self.worker.comm)
        # Not Optimizer.__init__, which would make param_groups of its own: this is how unpickling sets one up.
        super().__setstate__({})
        if not deferred:
            self.worker.prepare()

    # The inner optimizer's own, looked up at every use: load_state_dict replaces them.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner_optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        refuse_foreign_checkpoints()  # PyTorch's look at it before they change gradients and rates
        return self.inner_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner_optimizer.defaults

    @property
    def steps(self) -> int:
        """Inner steps completed since construction, or since the run that was resumed began."""
        return int(self.worker.progress.step) if self.worker.started else 0

    @property
    def bytes_sent(self) -> int:
        """Bytes that this worker has handed over since construction (before a ring multiplies them)."""
        return self.worker.meter.bytes_sent

    if TYPE_CHECKING:  # which would take every name for an attribute
        train: Callable[[], Any]
        eval: Callable[[], Any]
    else:

        def __getattr__(self, name: str) -> Any:
            """Return `train` or `eval`, where the inner optimizer has it: schedule-free optimizers do."""
            inner = self.__dict__.get("inner_optimizer")  # not there yet while a copy is made
            if name in ("train", "eval") and hasattr(inner, name):
                return partial(self.worker.switch, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "SlowMo can't be pickled or deep-copied: it holds connections to the other workers and hooks on its model. "
            "Copy state_dict() instead."
        )

    def __repr__(self) -> str:
        return f"SlowMo({self.inner_optimizer!r}, {self.config!r})"

    @hooked_at_need
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one inner step, and the outer step where it is due.

        Args:
            closure: as in torch.optim: reevaluates the model and returns the loss.

        Returns:
            The result of the inner optimizer's step.

        Raises:
            ValueError: on every rank at an outer step, if on one of them parameters or learning rates are not finite
                or the ranks have not made the same number of steps; nothing is written then.
            horovod.common.exceptions.HorovodInternalError, torch.distributed.DistNetworkError: another worker is gone;
                end this one.
            SystemExit: after a signal; see `on_preemption`.
        """
        worker = self.worker
        if initializes_state():
            return None
        refuse_foreign_checkpoints()
        worker.refuse_elsewhere("step()")
        if worker.hooks.missing and closure is None:
            if "found_inf" in self.__dict__:
                raise RuntimeError(
                    "the scaler has looked at gradients that no backward has averaged yet. Under a GradScaler, leave "
                    "one backward of every step outside of no_sync()."
                )
            worker.hooks.average()  # they come from elsewhere, or from no_sync() alone
        preemption.tell(worker.roll)
        try:
            result = worker.step(lambda: self._inner_step(closure))
        except Exception:  # the scaler takes them back only if all goes well
            self.__dict__.pop("found_inf", None)
            self.__dict__.pop("grad_scale", None)
            raise
        preemption.save_and_end(worker.roll, self.steps, self.save)
        return result

    def _inner_step(self, closure: Callable[[], Any] | None) -> Any:
        if "found_inf" not in self.__dict__:  # hasattr would go through __getattr__ in every step
            step = self.inner_optimizer.step
            return step() if closure is None else step(self.worker.hooks.averaged(closure))
        return scaled_step(self.inner_optimizer, self.grad_scale, self.found_inf)

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients: within it backward does not average gradients over the workers.

        Where gradients are averaged (gradients="all", warm-up), there is one exchange per step: at the first backward
        outside of no_sync(), over all accumulated gradients.

        Example:
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig.ar_sgd())
            >>> with optimizer.no_sync():
            ...     model(torch.ones(2, 3)).sum().backward()
            >>> model(torch.ones(2, 3)).sum().backward()
            >>> optimizer.step()
        """
        return self.worker.hooks.accumulate()

    def join(self, *, leaving: bool = False, scaler: torch.amp.GradScaler | None = None) -> JoinResult:
        """Wait for workers with more data, and leave all with the workers' mean. A collective.

        Call it at the end of an epoch, before evaluating and before saving on rank 0. Until all workers are in their
        join, this one takes part in the others' exchanges. The mean weighs a worker by its steps since the last
        average; where a block has just ended on all, nothing changes, bitwise. Afterwards all workers hold the same
        parameters, statistics, anchor and momentum, at the step of the one with the most steps.

        Args:
            leaving: this worker stops for good; the others find its rank in `JoinResult.left`.
            scaler: the GradScaler, needed where gradients are averaged under one.

        Returns:
            The number of steps by which this worker was behind (for a scheduler that counts steps), and the ranks that
            have left.

        Raises:
            ValueError: as in step(), on every rank.

        Example:
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig())
            >>> optimizer.join()
            JoinResult(behind=0, left=())
        """
        worker = self.worker
        worker.refuse_elsewhere("join()")
        worker.presence.refuse_if_left()
        if worker.comm.size == 1:
            worker.complete()
            worker.store.watch.expect_values()
            return JoinResult(0, worker.comm.ranks if leaving else ())
        before = self.steps
        left = take_part_in_join(worker, worker.optimizer() or self, leaving, scaler)
        if not left:
            preemption.save_and_end(worker.roll, self.steps, self.save)
        return JoinResult(self.steps - before, left)

    def restart(self) -> None:
        """Begin anew from rank 0's parameters and buffers, without momentum. A collective.

        Call it on every rank after values were loaded into the model: they are no progress of a block.

        Raises:
            ValueError: on every rank, if the workers are not at the same step.

        Example:
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig())
            >>> torch.nn.init.ones_(model.weight).tolist()
            [[1.0, 1.0, 1.0]]
            >>> optimizer.restart()
        """
        worker = self.worker
        worker.refuse_elsewhere("restart()")
        worker.presence.refuse_if_left()
        agree(worker.comm, {RESTART_FACT: self.steps}, {}, None)
        with torch.no_grad():
            worker.take_over(worker.assembly.machine.restart(worker.progress))
            worker.store.settle(equal=True)

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Let the model hold the workers' mean, statistics included; afterwards each worker has its own values back.

        A collective: every rank enters it, after the same step. The copy of the own values takes the model's size in
        memory.

        Raises:
            ValueError: on every rank, if one is elsewhere or its parameters are not finite.

        Example:
            >>> model = torch.nn.Linear(3, 1)
            >>> optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig())
            >>> with optimizer.averaged_parameters():
            ...     loss = model(torch.ones(2, 3)).mean()
        """
        worker = self.worker
        worker.refuse_while_averaging("averaged_parameters()")
        worker.presence.refuse_if_left()
        with worker.holding_mean():
            yield

    def metrics(self) -> Metrics | None:
        """Return the measurements of the last outer step; None before the first one.

        `residual`, `local`, `seconds_waited`, `hidden` and `bytes_sent` are this worker's own, the others equal on all.

        Raises:
            RuntimeError: constructed without metrics=True.

        Example:
            >>> model = torch.nn.Linear(3, 1)
            >>> inner = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> SlowMo(inner, model, SlowMoConfig(), metrics=True).metrics() is None
            True
        """
        return self.worker.metrics()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer, at any time. A collective: all workers get rank 0's values of it.

        Within a block the group counts as if it had been there, at its present learning rate, since the block began.

        Raises:
            ValueError: with gossip, between averages: weights and messages there belong to the parameters that have
                been mixed so far. With a parameter_map: workers of another framework can't follow.
        """
        add_param_group(self.worker, param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state_dict with one more entry, "slowmo". No communication.

        Tensors are references. A state from right after a join is common, and with one fragment and no delay one from
        right after an outer step: rank 0's serves every rank. Any other, and each in few bits or with shard=True, is
        this rank's own, and a resume that is bitwise the run without a stop gives each rank its own.
        """
        refuse_foreign_checkpoints()
        broadcasts = initializes_state()
        if broadcasts:
            slowmo_state.compare_at_broadcast(self.worker)
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        inner = self.inner_optimizer.state_dict()
        # Horovod's function writes what it finds in param_groups to those that are trained.
        state = inner if broadcasts else marked(inner)
        state = {**state, slowmo_state.KEY: slowmo_state.pack(self.worker)}
        for after in self._optimizer_state_dict_post_hooks.values():
            state = _returned(after(self, state), state)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state; the given dict is not changed. No communication.

        The model's own state is loaded by its own load_state_dict, after SlowMo is constructed: construction gives
        every rank the parameters of rank 0.

        Raises:
            CheckpointError: a ValueError; it does not fit, and nothing was changed.
        """
        worker = self.worker
        worker.refuse_while_averaging("load_state_dict()")
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"`state_dict` must be a dict. Received: {type(state_dict).__name__}")
        state_dict = {**state_dict}
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _returned(before(self, state_dict), state_dict)
        loadable = slowmo_state.check(state_dict, worker)
        with torch.no_grad():
            slowmo_state.restore(loadable, worker)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def save(self, path: checkpoint.AnyPath, *, parameter_map: ParameterMap | None = None) -> None:
        """Write the whole job's state, the model's included, to a file that Keras can read too. A collective.

        docs/checkpoints.md describes the files. `load` on as many workers is a bitwise resume.

        Args:
            path: the same on every rank, in a directory that all ranks see. Arrays that differ between ranks go into
                files beside it.
            parameter_map: None for the optimizer's own, the automatic one or, where there is none, PyTorch's own names,
                which Keras can't read.

        Raises:
            ValueError: on every rank, if one can't save or the ranks are not at the same step; a checkpoint that was
                there before is whole then.
        """
        checkpoint.save(self.worker.state_maker(parameter_map), self.worker.comm, path)

    def load(self, path: checkpoint.AnyPath, *, parameter_map: ParameterMap | None = None) -> None:
        """Continue from a checkpoint of `save`, of either framework: the model's values too. A collective.

        Raises:
            ValueError: on every rank, if a file is damaged or does not fit on one; nothing was changed.
        """
        worker = self.worker
        worker.presence.refuse_if_left()

        def make() -> TorchWorkerState:
            machine = worker.assembly.machine
            if worker.mixed and (machine.mixing.in_flight or machine.flights.in_flight):
                # Keras sends in its next step, and after a load that is another message.
                raise ValueError(
                    "this worker's messages are on their way, and those of Keras workers are not yet. In a job of both "
                    "frameworks over OSGP or with a delay, call join() on every worker before load()."
                )
            return worker.state(parameter_map)

        checkpoint.load(make, worker.comm, path)


def _returned(result: dict[str, Any] | None, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state that a state_dict hook leaves: its result, or the state that it may have changed in place."""
    return state if result is None else result
