"""One worker's part of a SlowMo optimizer, apart from Keras: its connections, its layout and its traces."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras
import tensorflow as tf

from hvd_slowmo.comm.failure import tell_steps
from hvd_slowmo.comm.launcher import elastic
from hvd_slowmo.comm.protocol import Comm, ScopedComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.layout import ParameterGroups
from hvd_slowmo.core.parts.progress import Observed
from hvd_slowmo.core.parts.roll_call import RollCall
from hvd_slowmo.core.parts.slices import OwnSlices
from hvd_slowmo.core.parts.whole import Whole, divided_vectors, gather_whole
from hvd_slowmo.core.regroup.dealing import FormerSlices
from hvd_slowmo.core.regroup.member import BrokenOff
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.core.start.startup import Job
from hvd_slowmo.core.step import preemption, refusals
from hvd_slowmo.core.step.metrics import Metrics, metrics_of
from hvd_slowmo.core.step.outer_log import OuterStepLog
from hvd_slowmo.topology.checks import consecutive_nodes
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_tf.checkpoint import KerasWorkerState, OptimizerParts
from hvd_slowmo_tf.checks import refuse_strategies
from hvd_slowmo_tf.connection import Connection
from hvd_slowmo_tf.inner_optimizer import InnerOptimizer
from hvd_slowmo_tf.interop.weights import array_of
from hvd_slowmo_tf.model.fingerprint import Fingerprint
from hvd_slowmo_tf.model.layout import KerasLayout, travelling
from hvd_slowmo_tf.model.trained import TrainedModel
from hvd_slowmo_tf.model.travelling import TravellingVariables
from hvd_slowmo_tf.model.variables import OptimizerVariables
from hvd_slowmo_tf.traces.failed_traces import drop_train_functions
from hvd_slowmo_tf.traces.in_place import compiled
from hvd_slowmo_tf.traces.traced_step import TracedStep
from hvd_slowmo_tf.traces.worker_traces import WorkerTraces

logger = logging.getLogger("hvd_slowmo")


class KerasWorker:
    """Hold one worker's parts in a plain object, into which Keras does not look.

    Keras would take every variable that it finds in an optimizer's attributes for one of the optimizer's own.

    Args:
        optimizer: SlowMo.
        inner: the optimizer that it wraps.
        parameter_map: of the job; None in a job of one framework.
        process_set: the Horovod process set that trains together; None for all ranks.
        comm: the workers, in place of Horovod's.
        observe: measure at every outer step.
        statistics: as of SlowMo.

    Attributes:
        job: once all workers have been brought to one start.
        left: ranks that have left for good.
        elastic: other workers may take the place of these, in an elastic job.
        connection: to the workers, made at the first use.
        trained: the model, for checkpoints.
        graph: of the gossip; None without.
        travelling: the variables that take part in exchanges.
        traces: the step and the join.
        fingerprint: of the trained variables that the last join left.
        broken_off: by the loss of another worker.
        former_slices: of former workers until they have been dealt anew, and whose they are; None else.
        written: numbers of the chunks of an outer step that was broken off which PyTorch workers had written and have
            handed over; None without. A Keras worker writes nothing before all is there.
        averaging: within `averaged_parameters()`.
        only_builds: `apply` makes variables and does nothing else, while a model's variables are looked for.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        inner: InnerOptimizer,
        parameter_map: ParameterMap | None,
        process_set: Any,
        comm: Comm | None,
        observe: bool,
        statistics: Mapping[str, bool] | None,
    ) -> None:
        self.optimizer = optimizer
        self.config: SlowMoConfig = optimizer.config
        self.inner = inner
        self.parameter_map = parameter_map
        self.observe = observe
        self.statistics = None if statistics is None else dict(statistics)
        self.job: Job | None = None
        self.left: tuple[int, ...] = ()
        self.elastic = comm is None and elastic()
        self.former_slices: FormerSlices | None = None
        self.written: set[int] | None = None
        self.broken_off = BrokenOff()
        self.averaging = self.only_builds = False
        self.travelling = TravellingVariables(optimizer, inner, self.config, parameter_map)
        self.fingerprint = Fingerprint(optimizer)
        watches = parameter_map is not None
        self.traces = WorkerTraces(optimizer, inner, self.config, observe, watches)
        self._sent_before = 0  # bytes, to former workers
        node = self.config.gradients == "node"
        self.connection = Connection(optimizer.name, process_set, comm, node=node, met=self._meet)
        self._log = OuterStepLog(self.config)
        self.trained = TrainedModel()
        self.graph: Graph | None = None
        self._variables: OptimizerVariables | None = None

    @property
    def step(self) -> TracedStep | None:
        """The step, traced; made for one layout."""
        return self.traces.step

    @property
    def comm(self) -> ScopedComm:
        """The workers under the optimizer's name, connected at the first use."""
        return self.connection.comm

    @property
    def variables(self) -> OptimizerVariables:
        """SlowMo's own variables, once the optimizer is built."""
        assert self._variables is not None, "the optimizer is built first"
        return self._variables

    @property
    def steps(self) -> int:
        """Inner steps made; 0 before SlowMo's variables are made, which another thread may see: the watchdog's."""
        return 0 if self._variables is None else self._variables.steps()

    def build(self, trained: list[keras.Variable]) -> None:
        """Make SlowMo's variables and the inner optimizer's. No communication."""
        if self.optimizer.use_ema:
            self.inner.show_averages(self.optimizer._model_variables_moving_average)
        self.inner.build(trained, reset=self.config.resets_inner_state)
        vectors: tuple[str, ...] = self.config.vectors
        weights = 0
        if self.config.gossip is not None:
            # The ranks of a node are not known yet; they do not change the vectors that are kept.
            comm = self.comm
            nodes = consecutive_nodes(comm.size, 1 if comm.node is None else comm.node.size)
            self.graph = Graph(self.config, comm.size, nodes)
            vectors, weights = (*vectors, *self.graph.vectors), comm.size
        layout = self.travelling.layout_of_parameters(trained, self.trained.whole)
        late = self.config.delay > 0
        vectors += ("in_flight",) if late else ()
        # Without slices the workers need not be known yet.
        rank, size = (self.comm.rank, self.comm.size) if self.config.sliced_vectors else (0, 1)
        slices = OwnSlices(self.config, layout.layout, rank, size)
        add_variable = self.optimizer.add_variable
        self._variables = OptimizerVariables(
            add_variable, layout.layout, vectors, weights, late, slices, self.config.slow_state == "host"
        )

    def assemble(self, layout: KerasLayout, groups: ParameterGroups, graph: Graph | None) -> TracedStep:
        """Return a step that is made for this layout: the former one, traces and all, if nothing has changed."""
        self.graph = graph
        if self.parameter_map is not None:
            self.variables.regroup(len(groups.own), self.optimizer._variables)
        workers, variables = self.connection.workers, self.variables
        return self.traces.assemble(workers, self.connection.name, self.elastic, variables, layout, groups, graph)

    def refuse_before_start(self) -> None:
        """Raise ValueError where `apply` can't train: a refusal in a trace comes before the trace makes variables.

        Raises:
            ValueError: several workers have not been brought to one start, or XLA compiles this call.
        """
        refuse_strategies()
        with tf.init_scope():
            if not self.only_builds:
                self.refuse_before_elastic_start()
            if self.only_builds or self.comm.size == 1:
                return
        if self.job is None or self.step is None:
            drop_train_functions()
            raise ValueError(
                f"{self.comm.size} workers, and they have not been brought to one start. Give fit() a "
                "SlowMoCallback(), or call optimizer.broadcast(model.variables) before the first gradient."
            )
        if compiled():
            drop_train_functions()
            raise ValueError(
                "XLA can't compile the exchange between workers. Compile the model with jit_compile=False, or give "
                "fit() a SlowMoCallback(), which sees to it."
            )

    def ready(self) -> TracedStep:
        """Return the step, where it can be called or traced.

        Raises:
            ValueError: as `refuse_before_start`.
        """
        self.refuse_before_start()
        with tf.init_scope():
            if self.step is not None:
                return self.step
            layout = self.travelling.layout_of(self.travelling.refs())
            return self.assemble(layout, ParameterGroups.single(len(layout.refs_of("parameter"))), self.graph)

    def call(self, traced: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function with collectives in it, traced or not; its errors and warnings come in plain words."""
        result = self.traces.call(traced, *arguments)
        self._log.look(self.comm, self.variables.steps, lambda: (self.bytes_sent, self._measured()))
        return result

    def join(self, leaving: bool) -> tuple[int, ...]:
        """Take part in a join; return the global ranks of the workers that leave. A collective."""
        preemption.tell(self.roll)
        self.broken_off.answered = None
        entered = self.fingerprint.differs()
        try:
            leavers = self.call(self.traces.join_now(), tf.constant(float(leaving), tf.float64)).numpy()
        except ValueError:  # the verdict of a meeting
            raise
        except Exception:  # of a transport, or TensorFlow's around it
            self.broken_off.answered = self.optimizer.steps
            raise
        left = tuple(rank for rank, gone in zip(self.comm.ranks, leavers, strict=True) if gone)
        self.left = left if len(left) < self.comm.size else ()  # all at once: nobody is missing
        if not left:
            self.roll.joined(self.optimizer.steps)
        self.fingerprint.joined(entered, leaving)
        return left

    def restart(self, entered: Sequence[int] = ()) -> None:
        """Give all workers rank 0's parameters, and begin a block there without momentum. A collective.

        Args:
            entered: ranks of workers whose parameters were given other values, for a warning.
        """
        machine = self.ready().assembly.machine
        self.call(lambda: self.variables.write(machine.restart(self.variables.read())))
        self.fingerprint.forget()
        if entered:
            logger.warning(
                "%s: parameters were given other values after the last training on %s (loaded weights, or Keras' "
                "moving average). All workers take rank 0's, and slow momentum begins anew. Call optimizer.restart() "
                "after loading to say that it is meant.",
                self.connection.name,
                ", ".join(f"rank {rank}" for rank in entered),
            )

    def complete(self) -> None:
        """Apply what is in flight. A collective."""
        machine = self.ready().assembly.machine
        if self.config.delay:
            self.call(lambda: self.variables.write(machine.complete(self.variables.read())))

    @contextmanager
    def holding_mean(self) -> Iterator[None]:
        """Let the model hold the workers' mean within, and its own values afterwards. A collective."""
        machine, variables = self.ready().assembly.machine, travelling(self.ready().assembly.layout)
        self.complete()
        own = [v.numpy() for v in variables]
        self.averaging = True
        try:
            self.call(lambda: machine.average(self.variables.read()))
            yield
        finally:
            self.averaging = False
            for v, value in zip(variables, own, strict=True):
                v.assign(value)

    @property
    def roll(self) -> RollCall:
        """The knowledge about all workers, once they have started."""
        return self.ready().assembly.runtime.roll

    def state_maker(
        self, model: keras.Model | None = None, parameter_map: ParameterMap | None = None
    ) -> Callable[[], KerasWorkerState]:
        """Return a function that returns this worker's state for a save. A collective; arguments as in `state`."""
        self.refuse_if_left()
        whole: Whole = {}
        # Before the start nobody can be asked for the other slices of a loaded state, and `ready` says so.
        if divided_vectors(self.config) and (self.step is not None or self.optimizer.steps):
            whole = self.call(gather_whole, self.ready().assembly.runtime, array_of)
        return lambda: self.state(model, parameter_map, whole)

    def state(
        self, model: keras.Model | None, parameter_map: ParameterMap | None, whole: Whole | None = None
    ) -> KerasWorkerState:
        """Return this worker's state for checkpoints.

        Args:
            model: None for the one of the start.
            parameter_map: None for the optimizer's own.
            whole: vectors that are kept in slices, for a save.
        """
        self.refuse_while_averaging("save() or load()")
        found = self.trained.known if model is None else model
        if isinstance(found, list) and not found:
            raise ValueError("give the Keras model: optimizer.save(path, model), optimizer.load(path, model).")
        if isinstance(found, keras.Model):
            self.optimizer.build(found.trainable_variables)
        if self.step is None and self.parameter_map is not None:
            raise ValueError("with a parameter_map a checkpoint is of a job that has started: call broadcast(model).")
        layout = self.travelling.layout_of(self.travelling.refs()) if self.step is None else self.step.assembly.layout
        comm = self.comm
        slices = OwnSlices(self.config, layout.layout, comm.rank, comm.size)
        parts = OptimizerParts(self.inner, self.variables, layout, self.graph, comm.rank, comm.size, slices)
        told = self.fingerprint.told()
        return KerasWorkerState(self.optimizer, parts, found, parameter_map or self.parameter_map, whole, told)

    def metrics(self) -> Metrics | None:
        """Return the measurements of the last outer step; None before the first one.

        Raises:
            RuntimeError: nothing is measured.
        """
        refusals.refuse_unmeasured(self.observe)
        return self._measured()

    def _measured(self) -> Metrics | None:
        step, sent, seconds = (0, 0, 0.0) if self.step is None else self.step.comm.last_lap
        seen = Observed(*self.variables.now.observed.tolist())
        return metrics_of(seen, step, seconds, seconds, sent) if step else None

    def refuse_if_left(self) -> None:
        """Raise RuntimeError once some workers have left for good."""
        refusals.refuse_if_left(self.left)

    def caller_context(self) -> AbstractContextManager[None]:
        """Return a context for another thread: an empty one, since TensorFlow orders the work on a device itself."""
        return nullcontext()

    def averaged_ids(self) -> set[int]:
        """Return ids of the variables that are averaged without being trained."""
        return {id(ref.variable) for ref in self.ready().assembly.layout.refs_of("statistic")}

    def refuse_while_averaging(self, what: str) -> None:
        """Raise RuntimeError within `averaged_parameters()`."""
        refusals.refuse_while_averaging(self.averaging, what)

    def reassemble(self, comm: Comm) -> None:
        """Go on with other workers: all variables stay."""
        self._sent_before = self.bytes_sent
        self.left = ()
        if self.step is not None:
            self.written = self.step.assembly.machine.meetings.written
        self.traces.step = None
        self.fingerprint.forget()
        self.connection.replace(comm)

    @property
    def bytes_sent(self) -> int:
        """Bytes handed over for sums and messages."""
        return self._sent_before + (0 if self.step is None else self.step.comm.bytes_sent)

    def refuse_before_elastic_start(self) -> None:
        """Raise RuntimeError in an elastic job whose workers have not come together."""
        if self.elastic and self.job is None:
            raise RuntimeError(refusals.not_started("model"))

    def _meet(self, comm: Comm) -> None:
        tell_steps(comm, self, KerasWorker._steps)

    def _steps(self) -> int | None:
        return None if self.job is None else self.steps
