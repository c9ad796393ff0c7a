"""One worker's part of a SlowMo optimizer, apart from Keras: its connections, its layout and its traces."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import keras
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from hvd_slowmo.comm.protocol import Comm, ScopedComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.assembly import Assembly, assemble
from hvd_slowmo.core.graph import Graph
from hvd_slowmo.core.layout import ParameterGroups, lay_out
from hvd_slowmo.core.ledger import RATES
from hvd_slowmo.core.metrics import Metrics
from hvd_slowmo.core.names import within_step
from hvd_slowmo.core.runtime import Runtime
from hvd_slowmo.core.startup import Job
from hvd_slowmo.topology.checks import consecutive_nodes
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_tf.checks import refuse_strategies
from hvd_slowmo_tf.graph_comm import GraphSafeComm
from hvd_slowmo_tf.horovod import HorovodComm, workers
from hvd_slowmo_tf.inner_optimizer import InnerOptimizer
from hvd_slowmo_tf.layout import KerasLayout, VariableRef, mapped_refs, refs_of, travelling
from hvd_slowmo_tf.measurements import Measurements
from hvd_slowmo_tf.ops import TracedOps
from hvd_slowmo_tf.store import VariableStore
from hvd_slowmo_tf.traced_join import traced_join
from hvd_slowmo_tf.traced_step import TracedStep, once
from hvd_slowmo_tf.variables import OptimizerVariables

T = TypeVar("T")


@dataclass(frozen=True)
class OptimizerParts:
    """The parts of a built optimizer that a checkpoint reads and writes.

    Attributes:
        layout: of the model.
        graph: of the gossip; None without.
        workers: number of workers of the job.
    """

    inner: InnerOptimizer
    variables: OptimizerVariables
    layout: KerasLayout
    graph: Graph | None
    workers: int


@dataclass(frozen=True)
class Traced:
    """The parts of a started optimizer, with the functions that TensorFlow has traced, or will."""

    assembly: Assembly[VariableRef]
    ops: TracedOps
    comm: GraphSafeComm
    measurements: Measurements | None
    step: TracedStep
    join: Callable[[tf.Tensor], tf.Tensor]


class KerasWorker:
    """A plain object, into which Keras does not look.

    Keras would take every variable that it finds in an optimizer's attributes for one of the optimizer's own.

    Args:
        optimizer: SlowMo.
        inner: the optimizer that it wraps.
        parameter_map: of the job; None in a job of one framework.
        process_set: the Horovod process set that trains together; None for all ranks.
        comm: the workers, in place of Horovod's.
        observe: measure at every outer step.

    Attributes:
        config: the settings.
        traced: once assembled.
        job: once all workers have been brought to one start.
        left: ranks that have left for good.
        averaging: within `averaged_parameters()`.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        inner: InnerOptimizer,
        parameter_map: ParameterMap | None,
        process_set: Any,
        comm: Comm | None,
        observe: bool,
    ) -> None:
        self.optimizer = optimizer
        self.config: SlowMoConfig = optimizer.config
        self.inner = inner
        self.parameter_map = parameter_map
        self.observe = observe
        self.traced: Traced | None = None
        self.job: Job | None = None
        self.left: tuple[int, ...] = ()
        self.averaging = False
        self._process_set = process_set
        self._comm = comm
        self._graph: Graph | None = None
        self._variables: OptimizerVariables | None = None
        self._model: weakref.ref[keras.Model] | None = None
        self._model_variables: list[keras.Variable] = []

    @property
    def comm(self) -> ScopedComm:
        """The workers under the optimizer's name, connected at the first use."""
        if self._comm is None:
            self._comm = workers.connect(self._process_set, node=self.config.gradients == "node")
        return ScopedComm(self._comm, self.optimizer.name)

    @property
    def variables(self) -> OptimizerVariables:
        """SlowMo's own variables, once the optimizer is built."""
        assert self._variables is not None, "the optimizer is built first"
        return self._variables

    @property
    def model(self) -> keras.Model | list[keras.Variable]:
        """The model of the start; its variables if it was not given itself, or is gone."""
        model = None if self._model is None else self._model()
        return self._model_variables if model is None else model

    def remember(self, model: keras.Model | None, variables: list[keras.Variable]) -> None:
        """Remember the model that is trained, and its variables, for checkpoints."""
        self._model = None if model is None else weakref.ref(model)
        self._model_variables = variables

    def build(self, trained: list[keras.Variable]) -> None:
        """Make SlowMo's variables and the inner optimizer's. No communication."""
        self.inner.build(trained, reset=self.config.inner_state == "reset" or self.config.nonfinite == "exclude")
        vectors: tuple[str, ...] = self.config.vectors
        weights = 0
        if self.config.gossip is not None:
            # Of this job's workers. Which of them share a node is not known yet, and does not change the vectors.
            comm = self.comm
            node_size = 1 if comm.node is None else comm.node.size
            self._graph = Graph(self.config, comm.size, consecutive_nodes(comm.size, node_size))
            vectors, weights = (*vectors, *self._graph.vectors), self._graph.size
        # With a map the tensors have another order and other shapes, which does not change the length of a chunk.
        layout = self._lay_out(refs_of("parameter", trained, self.parameter_map is not None)).layout
        self._variables = OptimizerVariables(self.optimizer.add_variable, layout, vectors, weights)

    def refs(self, statistics: Sequence[keras.Variable], model: keras.Model | None = None) -> list[VariableRef]:
        """Return the tensors of the model that take part, once the optimizer is built.

        Args:
            statistics: variables among which the floating-point ones are averaged.
            model: needed with a map.
        """
        optimizer, trained = self.optimizer, self.optimizer._trainable_variables
        if self.parameter_map is not None and model is not None:
            return mapped_refs(model, self.parameter_map, trained)
        known = {id(v) for v in trained}
        averaged = [v for v in statistics if id(v) not in known and tf.as_dtype(v.dtype).is_floating]
        moving = optimizer._model_variables_moving_average if optimizer.use_ema else ()
        one_device = self.parameter_map is not None
        return [*refs_of("parameter", trained, one_device), *refs_of("statistic", [*averaged, *moving], one_device)]

    def layout_of(self, refs: Sequence[VariableRef]) -> KerasLayout:
        """Lay out these tensors, and the inner optimizer's state where it is averaged."""
        averages = self.config.inner_state == "average" and self.config.tau is not None
        state = self.inner.floating_state if averages else []
        return self._lay_out([*refs, *refs_of("optimizer_state", state, self.parameter_map is not None)])

    def assemble(self, layout: KerasLayout, groups: ParameterGroups, graph: Graph | None) -> Traced:
        """Return everything that a step needs: the former parts, traces and all, if nothing has changed."""
        self._graph = graph
        if self.parameter_map is not None:
            self.variables.regroup(len(groups.own), self.optimizer._variables)
        if self.traced is None or not _alike(self.traced.assembly, layout, groups, graph):
            self.traced = self._assembled(layout, groups, graph)
        return self.traced

    def ready(self) -> Traced:
        """Return the parts for a step, a join or an average.

        Raises:
            ValueError: several workers have not been brought to one start, or XLA compiles this call.
        """
        refuse_strategies()
        with tf.init_scope():
            if self.comm.size == 1:
                return self.traced or self._assembled_alone()
        if self.job is None or self.traced is None:
            raise ValueError(
                f"{self.comm.size} workers, and they have not been brought to one start. Give fit() a "
                "SlowMoCallback(), or call optimizer.broadcast(model.variables) before the first gradient."
            )
        if tf.inside_function() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise ValueError(
                "XLA can't compile the exchange between workers. Compile the model with jit_compile=False, or give "
                "fit() a SlowMoCallback(), which sees to it."
            )
        return self.traced

    def call(self, traced: Callable[..., Any], *arguments: Any) -> Any:
        """Call a traced function with collectives in it; its errors and warnings come in plain words."""
        assert self.traced is not None, "the workers have started"
        return self.traced.ops.call(traced, *arguments)

    def average(self) -> None:
        """Set the model to the workers' mean. A collective."""
        machine = self.ready().assembly.machine
        self.call(once(lambda: machine.average(self.variables.read())))

    def parts(self) -> OptimizerParts:
        """Return the parts that a checkpoint needs, also before the start.

        Raises:
            ValueError: with a map, before the start.
        """
        if self.traced is not None:
            layout = self.traced.assembly.layout
        elif self.parameter_map is None:
            layout = self.layout_of(self.refs(()))
        else:
            raise ValueError("with a parameter_map a checkpoint is of a job that has started: call broadcast(model).")
        return OptimizerParts(self.inner, self.variables, layout, self._graph, self.comm.size)

    def bytes_sent(self) -> int:
        """Return the bytes handed over for sums since the start."""
        return 0 if self.traced is None else self.traced.comm.bytes_sent

    def metrics(self) -> Metrics | None:
        """Return the measurements of the last outer step; None before the first one."""
        if self.traced is None or self.traced.measurements is None:
            return None
        return self.traced.measurements.last(self.variables.now.observed)

    def refuse_if_left(self) -> None:
        """Raise RuntimeError once some workers have left for good."""
        if self.left:
            raise RuntimeError(f"ranks {list(self.left)} have left in join(leaving=True): nothing can be averaged.")

    def refuse_while_averaging(self, what: str) -> None:
        """Raise RuntimeError within `averaged_parameters()`."""
        if self.averaging:
            raise RuntimeError(f"{what} within averaged_parameters(): the parameters there are not this worker's own.")

    def _lay_out(self, refs: Sequence[VariableRef]) -> KerasLayout:
        parameters = sum(ref.spec.role == "parameter" for ref in refs)
        return lay_out(refs, ParameterGroups.single(parameters), self.optimizer.chunk_bytes)

    def _assembled_alone(self) -> Traced:
        layout = self.layout_of(self.refs(()))
        return self.assemble(layout, ParameterGroups.single(len(layout.refs_of("parameter"))), self._graph)

    def _assembled(self, layout: KerasLayout, groups: ParameterGroups, graph: Graph | None) -> Traced:
        comm, name = self._comm, self.optimizer.name
        assert comm is not None, "connected by now"
        names = [f"{name}.{each}" for each in within_step(layout.layout)]
        safe = GraphSafeComm(comm, names, timed=self.observe)
        explain = comm.latch.explain if isinstance(comm, HorovodComm) else None
        ops = TracedOps(name, (comm.size, RATES + layout.layout.group_count), explain)
        store = VariableStore(layout, self.variables.vectors, self.inner)
        scoped = ScopedComm(safe, name)
        runtime = Runtime(self.config, layout.layout, ops, store, scoped, observe=self.observe)
        assembly = assemble(runtime, layout, groups, graph)
        measurements = Measurements(safe) if self.observe else None
        step = TracedStep(self.optimizer, self.inner, self.variables, assembly, measurements)
        return Traced(assembly, ops, safe, measurements, step, traced_join(step))


def _alike(before: Assembly[VariableRef], layout: KerasLayout, groups: ParameterGroups, graph: Graph | None) -> bool:
    """Return whether the parts that were assembled before are of this layout."""
    same_graph = (before.graph and before.graph.digest) == (graph and graph.digest)
    variables = [[id(v) for v in travelling(each)] for each in (before.layout, layout)]
    return same_graph and before.groups == groups and variables[0] == variables[1]
