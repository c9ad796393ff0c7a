"""A worker's step and join, which are traced once for a layout, and calls of everything with collectives in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvd_slowmo.comm.protocol import Comm, ScopedComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.average.ledger import RATES
from hvd_slowmo.core.parts.layout import ParameterGroups
from hvd_slowmo.core.parts.names import within_step
from hvd_slowmo.core.parts.outer_update import Kernels
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.core.step.assembly import Assembly, assemble
from hvd_slowmo_tf.horovod import HorovodComm
from hvd_slowmo_tf.inner_optimizer import InnerOptimizer
from hvd_slowmo_tf.model.layout import KerasLayout, VariableRef, travelling
from hvd_slowmo_tf.model.store import VariableStore
from hvd_slowmo_tf.model.variables import OptimizerVariables
from hvd_slowmo_tf.traces.codec import KerasCodec
from hvd_slowmo_tf.traces.graph_comm import GraphSafeComm
from hvd_slowmo_tf.traces.ops import TracedOps
from hvd_slowmo_tf.traces.tiles import tiled_outer_update
from hvd_slowmo_tf.traces.traced_join import traced_join
from hvd_slowmo_tf.traces.traced_step import TracedStep


class WorkerTraces:
    """Hold what is made for one layout, and make it anew where the layout, the groups or the graph have changed.

    Args:
        optimizer: SlowMo.
        inner: the optimizer that it wraps.
        config: the settings.
        observe: measure at every outer step.
        watches: workers of another framework may tell of values from outside.

    Attributes:
        step: None before the first layout, and until other workers have theirs.
        join: a tf.function, made with the step.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        inner: InnerOptimizer,
        config: SlowMoConfig,
        observe: bool,
        watches: bool,
    ) -> None:
        self._optimizer, self._inner, self._config = optimizer, inner, config
        self._observe, self._watches = observe, watches
        self.step: TracedStep | None = None
        self.join: Any = None
        self._ops: TracedOps | None = None
        self._store: VariableStore | None = None

    def assemble(
        self,
        comm: Comm,
        name: str,
        elastic: bool,
        variables: OptimizerVariables,
        layout: KerasLayout,
        groups: ParameterGroups,
        graph: Graph | None,
    ) -> TracedStep:
        """Return a step that is made for this layout: the former one, traces and all, if nothing has changed.

        Args:
            comm: the workers, connected.
            name: of the optimizer in the names of its collectives.
            elastic: other workers may take the place of these.
            variables: SlowMo's own.
            layout: of the tensors that travel.
            groups: of the parameters.
            graph: of the gossip.

        Raises:
            ValueError: the variables were made for messages of other lengths.
        """
        if self.step is not None and _alike(self.step.assembly, layout, groups, graph):
            return self.step
        names = [f"{name}.{each}" for each in within_step(layout.layout)]
        safe = GraphSafeComm(comm, names, timed=self._observe)
        explain = comm.failures.explain if isinstance(comm, HorovodComm) else None
        self._ops = TracedOps(name, (comm.size, RATES + layout.layout.group_count), explain)
        if not variables.fit(layout.layout):
            raise ValueError(
                "the optimizer was built before its model was known, and with few bits the map's shapes decide what is "
                "sent in which way. Call broadcast(model) before build()."
            )
        tiled = comm.size > 1  # XLA may compile a worker alone
        store = self._store = VariableStore(layout, variables.vectors, self._inner, variables.slices)
        runtime = Runtime(
            self._config,
            layout.layout,
            self._ops,
            store,
            ScopedComm(safe, name),
            Kernels(tiled_outer_update) if tiled else Kernels(),
            observe=self._observe,
            watches=self._watches,  # PyTorch workers tell of values from outside
            codec=KerasCodec(tiled),
            writes_at_once=elastic,
        )
        assembly = assemble(runtime, layout, groups, graph)
        assembly.machine.undone = variables.write
        self.step = TracedStep(self._optimizer, self._inner, variables, assembly, safe, elastic)
        self.join = traced_join(self.step)
        return self.step

    def call(self, traced: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function with collectives in it, traced or not; its errors and warnings come in plain words."""
        assert self._ops is not None, "the workers have started"
        return self._ops.call(traced, *arguments)

    def join_now(self) -> Callable[[tf.Tensor], tf.Tensor]:
        """Return the join at the present step, traced where it follows the others step by step.

        Where it only meets them, once in a block, it runs operation by operation: a trace would take seconds.
        """
        assert self.step is not None, "made with the join"
        assembly = self.step.assembly
        plan = assembly.machine.plan(self.step.variables.now)
        steps = assembly.graph is not None or (assembly.averages.ever and bool(assembly.averages.due(plan)))
        found: Callable[[tf.Tensor], tf.Tensor] = self.join if steps else self.join.python_function
        return found

    def resend_statistics(self) -> None:
        """Let an exchange in flight take statistics as they are: a state that has been loaded holds no others."""
        if self._store is not None:
            self._store.resend_statistics()


def _alike(before: Assembly[VariableRef], layout: KerasLayout, groups: ParameterGroups, graph: Graph | None) -> bool:
    """Return whether parts that were assembled before serve this layout."""
    same_graph = (before.graph and before.graph.digest) == (graph and graph.digest)
    former, variables = ([id(v) for v in travelling(each)] for each in (before.layout, layout))
    return same_graph and before.groups == groups and former == variables
