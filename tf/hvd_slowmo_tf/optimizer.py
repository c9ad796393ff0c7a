"""SlowMo as a Keras optimizer around any other."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from hvd_slowmo.checkpoint import job as snapshot
from hvd_slowmo.checkpoint.inner_state import Carried
from hvd_slowmo.comm.protocol import Comm, SoloComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.join import Joined
from hvd_slowmo.core.metrics import Metrics
from hvd_slowmo.core.mixing import Graph, agreed_graph
from hvd_slowmo.core.startup import Groups
from hvd_slowmo.topology.checks import consecutive_nodes
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_tf.checkpoint import KerasSide
from hvd_slowmo_tf.checks import check_inner, check_settings, check_together, refuse_strategies
from hvd_slowmo_tf.horovod import workers
from hvd_slowmo_tf.inner_optimizer import Inner
from hvd_slowmo_tf.layout import entries_of, lay_out, mapped, parts_of
from hvd_slowmo_tf.startup import Prepared, start
from hvd_slowmo_tf.traced_join import make_join
from hvd_slowmo_tf.traced_step import Engine, once
from hvd_slowmo_tf.variables import State


@keras.saving.register_keras_serializable(package="hvd_slowmo", name="SlowMo")
class SlowMo(keras.optimizers.Optimizer):
    """Slow momentum (Wang et al., ICLR 2020, arXiv 1910.00643, Algorithm 1) around a Keras optimizer.

    A keras.optimizers.Optimizer: `model.compile(SlowMo(inner_optimizer, config), ...)`, or `apply` in a loop of one's
    own. Every update is one inner step; every `config.tau` of them the workers average their parameters and take a
    momentum step. All state is in `variables`.

    Nothing is exchanged before `SlowMoCallback`, or `broadcast` in a loop of one's own, has brought all workers to the
    same start; both are collectives.

    The learning rate (with its schedule), gradient accumulation and the moving average of the weights move from the
    inner optimizer to this one: its `iterations` count every call, those of an overflow too. Clipping, weight decay and
    loss scaling stay with the inner one. Under "mixed_float16" wrap the scaler:
    `SlowMo(keras.optimizers.LossScaleOptimizer(inner), config)`.

    Args:
        inner_optimizer: any Keras optimizer.
        config: what to do; see `SlowMoConfig`.
        process_set: the Horovod process set that trains together. None: all ranks. Not part of a saved model.
        name: prefix of the collectives' names; a second optimizer in one process takes another.
        metrics: measure at every outer step what `metrics()` tells; costs about as much as the outer update itself.
        parameter_map: train together with workers of another framework: which parameter is which there. Every worker
            gives the same one; `ParameterMap()` for models with the same layers in the same order. Not part of a saved
            model.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def __new__(cls, inner_optimizer: Any = None, *args: Any, **kwargs: Any) -> Any:
        scaled = isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer)
        return super().__new__(_ScaledSlowMo if scaled and cls is SlowMo else cls)

    def __init__(
        self,
        inner_optimizer: Any,
        config: SlowMoConfig,
        *,
        process_set: Any = None,
        name: str = "slowmo",
        metrics: bool = False,
        parameter_map: ParameterMap | None = None,
    ) -> None:
        check_settings(config, name, process_set, parameter_map)
        check_inner(inner_optimizer)
        inner = Inner(inner_optimizer)
        check_together(inner, config, parameter_map)
        keras.optimizers.Optimizer.__init__(self, name=name, **inner.taken)
        self.inner_optimizer = inner_optimizer
        self.config = config
        self._process_set = process_set
        self._observing = metrics
        self._map = parameter_map
        self._inside = _Inside(inner)

    @classmethod
    def over(
        cls, comm: Comm, inner_optimizer: Any, config: SlowMoConfig, *, node: Comm | None = None, **settings: Any
    ) -> SlowMo:
        """As the constructor, over any `hvd_slowmo.comm.protocol.Comm` on tensors of a trace.

        node: the workers of this one's node, for gradients="node".
        """
        optimizer: SlowMo = cls(inner_optimizer, config, **settings)
        optimizer._inside.comm, optimizer._inside.node = comm, node
        return optimizer

    # What Keras asks of an optimizer

    @property
    def variables(self) -> list[Any]:
        return [*self._variables, *self._inside.inner.optimizer.variables]

    @property
    def loss_scale_factor(self) -> Any:
        return self._inside.inner.optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: Any) -> None:
        """Keras' own constructor sets it; see __setattr__."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Only a scaler around this optimizer does that, with None: Keras lets no setter see what changes nothing.
        if name == "loss_scale_factor" and "_inside" in self.__dict__:
            raise ValueError(
                "a LossScaleOptimizer around SlowMo would skip whole steps on one worker alone (compile() makes one "
                "under 'mixed_float16'). Put it within: "
                "SlowMo(keras.optimizers.LossScaleOptimizer(inner_optimizer), config)"
            )
        super().__setattr__(name, value)

    def scale_loss(self, loss: Any) -> Any:
        return self._inside.inner.optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        self._inside.inner.innermost.exclude_from_weight_decay(var_list, var_names)

    def build(self, variables: Sequence[Any]) -> None:
        """Make all variables. No communication."""
        if self.built:
            return
        variables = list(variables)
        inside = self._inside
        needs_reset = self.config.buffers == "reset" or self.config.nonfinite == "exclude"
        with tf.init_scope():
            keras.optimizers.Optimizer.build(self, variables)
            inside.inner.build(variables, reset=needs_reset)
            vectors, weights = self.config.vectors, 0
            if self.config.base != "local":  # the graph is one of this job's workers; nothing is exchanged for that
                inside.graph = Graph(self.config, self._connect().size, self._likely_nodes())
                vectors, weights = (*vectors, *inside.graph.vectors), inside.graph.size
            # With a map the entries have another order and other shapes, which changes no chunk's length.
            layout = lay_out(entries_of(variables, ()), (), None, self._map is not None).layout
            inside.state = State(self.add_variable, layout, vectors, weights)

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """One step: the inner optimizer's, and the outer step where it is due.

        Args:
            grads: a gradient per variable: a tensor, IndexedSlices or None.
            trainable_variables: the variables; those of `build` if None.

        Raises:
            ValueError: on every rank at an outer step, if on one of them parameters or learning rates are not finite
                or the ranks have not made the same number of steps; nothing is written then. Within a tf.function of
                one's own it is a tf.errors.InvalidArgumentError with the same facts. Also where several workers have
                not been brought to one start, and where XLA compiles this call.
        """
        grads = list(grads)
        if not grads:
            return
        if trainable_variables is None:
            if not self.built:
                raise ValueError("the optimizer has no variables yet: pass them, or call build(variables) first.")
            trainable_variables = self._trainable_variables
        trainable_variables = list(trainable_variables)
        self.build(trainable_variables)
        self._check_variables_are_known(trainable_variables)
        engine = self._ready()
        self._refuse_within_average("apply()")
        given = {self._get_variable_index(v): g for v, g in zip(trainable_variables, grads, strict=True)}
        ordered = [given.get(number) for number in range(len(self._trainable_variables))]
        if all(g is None for g in ordered):
            raise ValueError("no gradient for any variable: all of them are None.")
        if tf.inside_function():
            engine.step(ordered, engine.depart(ordered))
        else:
            engine.call(engine.step, ordered)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        if self.use_ema:
            keras.optimizers.Optimizer.finalize_variable_values(self, var_list)
        else:
            self._inside.inner.optimizer.finalize_variable_values(var_list)

    def save_own_variables(self, store: Any) -> None:
        # The inner optimizer's are saved with it: it is an attribute.
        for number, v in enumerate(self._variables):
            store[str(number)] = v.numpy()

    def load_own_variables(self, store: Any) -> None:
        if not self.built:  # weights may well be loaded for another training than the one that they come from
            warnings.warn(
                "SlowMo's part of the file is not loaded: this optimizer has no variables yet. To resume that "
                "training, call optimizer.build(model.trainable_variables) first.",
                stacklevel=2,
            )
            return
        if len(store.keys()) != len(self._variables):
            raise ValueError(
                f"the file has {len(store.keys())} variables of SlowMo, this optimizer has {len(self._variables)}. "
                "Load it with the settings and the model of the run that is resumed."
            )
        values = [np.asarray(store[str(number)]) for number in range(len(self._variables))]
        for v, value in zip(self._variables, values, strict=True):  # before any of them changes
            if tuple(v.shape) != value.shape:
                raise ValueError(
                    f"{v.path} has shape {value.shape} in the file and {tuple(v.shape)} here. Load it with the "
                    "settings and the model of the run that is resumed, over a gossip base with as many workers too."
                )
        for v, value in zip(self._variables, values, strict=True):
            v.assign(value)

    def get_config(self) -> dict[str, Any]:
        rate = keras.optimizers.Optimizer.get_config(self)["learning_rate"]
        return {
            "name": self.name,
            "inner_optimizer": self._inside.inner.serialized(rate),
            "config": self.config.facts(),
            "metrics": self._observing,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> SlowMo:
        settings = dict(config)
        inner = keras.saving.deserialize_keras_object(settings.pop("inner_optimizer"), custom_objects=custom_objects)
        return SlowMo(inner, SlowMoConfig(**settings.pop("config")), **settings)

    # What SlowMo adds

    @property
    def steps(self) -> int:
        """Inner steps (updates) completed since construction, or since the run that was resumed began."""
        return int(self._inside.state.now.step) if self.built else 0

    def broadcast(self, variables: Any) -> None:
        """Bring all workers to one start. A collective, before the first gradient is taken.

        The workers compare their settings and variables. If none has made a step, or rank 0 alone has (it has loaded a
        checkpoint), all get rank 0's variables and optimizer state. If all are at the same step, each has restored its
        own file and is left as it is.

        With workers of another framework all start at step 0. The optimizer's state and what the map does not show come
        from the first worker that has Keras, all else from rank 0.

        Args:
            variables: all of the model's, `model.variables`. Floating-point variables that the optimizer does not train
                (BatchNorm's statistics) are averaged at outer steps and joins too; leave out frozen layers', or they
                travel as well. The state of seed generators stays each worker's own. Or the model itself, of which the
                statistics of frozen layers are left out; with a parameter_map it is needed.

        Raises:
            TypeError, ValueError: on every rank, if settings, variables or steps differ.
        """
        model = variables if isinstance(variables, keras.Model) else None
        inside = self._inside
        comm = self._connect()
        given, statistics = parts_of(model) if model is not None else (list(variables),) * 2
        inside.given, inside.model = given, None if model is None else weakref.ref(model)
        job = start(
            comm, self, given, lambda: self._prepare(given, statistics, model), self._agreed_graph, self._assembled
        )
        inside.started, inside.left = True, ()
        self.engine.mixed = job.mixed

    def join(self, variables: Any = None, *, leaving: bool = False) -> Joined:
        """Wait for workers with more data, and leave all with the workers' mean. A collective.

        At the end of an epoch, before evaluating and before saving on rank 0. See the PyTorch adapter's; here
        `iterations` too become those of the worker with the most steps.

        Args:
            variables: None, or those that were given to `broadcast`, which is checked; or the model.
            leaving: this worker stops for good; the others find its rank in `Joined.left`.

        Returns:
            By how many steps this worker was behind, and who has left.

        Raises:
            ValueError: as in `apply`, on every rank.
        """
        self._refuse_within_average("join()")
        self._refuse_if_left()
        engine = self._ready()
        variables = None if isinstance(variables, keras.Model) else variables
        known = {id(v) for v in engine.plan.variables}
        lacking = [v.path for v in variables or () if tf.as_dtype(v.dtype).is_floating and id(v) not in known]
        if lacking:
            raise ValueError(f"broadcast() was not given {', '.join(lacking)}: join() can't average what it lacks.")
        if engine.comm.size == 1:
            return Joined(0, engine.comm.ranks if leaving else ())
        before = self.steps
        leavers = engine.call(self._inside.join, tf.constant(float(leaving), tf.float64)).numpy()
        left = tuple(rank for rank, gone in zip(engine.comm.ranks, leavers, strict=True) if gone)
        self._inside.left = left if len(left) < engine.comm.size else ()  # all at once: nobody is missing
        return Joined(self.steps - before, left)

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
        engine = self._ready()
        held = engine.plan.variables
        own = [v.numpy() for v in held]
        self._inside.averaging = True
        try:
            engine.call(once(lambda: engine.machine.average(engine.state.read())))
            yield
        finally:
            self._inside.averaging = False
            for v, value in zip(held, own, strict=True):
                v.assign(value)

    def save(self, path: snapshot.AnyPath, model: Any = None, *, parameter_map: ParameterMap | None = None) -> None:
        """Write the whole job's state, the model's included, to a file that PyTorch can read too. A collective.

        docs/checkpoints.md says what is in the files. `load` on as many workers is a resume to the bit.

        Args:
            path: the same on every rank, in a folder that all ranks see. What only one rank has goes beside it.
            model: the Keras model. None: the one that SlowMoCallback trains or, in a loop of one's own, the variables
                that were given to `broadcast`, by their order, which PyTorch can't read.
            parameter_map: None for the automatic one or, where there is none, the order of the variables.

        Raises:
            ValueError: on every rank, if one can't save or the ranks are not at the same step; a checkpoint that was
                there before is whole then.
        """
        self._refuse_if_left()
        snapshot.save(lambda: self._side(model, parameter_map), self._connect(), self.name, path)

    def load(self, path: snapshot.AnyPath, model: Any = None, *, parameter_map: ParameterMap | None = None) -> None:
        """Continue from a checkpoint of `save`, of either framework: the model's values too. A collective.

        Before `fit`, or after `broadcast` in a loop of one's own.

        Args:
            model, parameter_map: as in `save`.

        Raises:
            ValueError: on every rank, if a file is damaged or does not fit on one; nothing was changed.
        """
        self._refuse_if_left()
        snapshot.load(lambda: self._side(model, parameter_map), self._connect(), self.name, path)

    def _side(self, model: Any, parameter_map: ParameterMap | None) -> KerasSide:
        inside = self._inside
        self._refuse_within_average("save() or load()")
        found = model
        if found is None and inside.model is not None:
            found = inside.model()
        found = inside.given if found is None else found
        if isinstance(found, list) and not found:
            raise ValueError("give the Keras model: optimizer.save(path, model), optimizer.load(path, model).")
        if isinstance(found, keras.Model):
            self.build(found.trainable_variables)
        graph = None if inside.graph is None else inside.graph.digest
        if inside.engine is None and self._map is not None:
            raise ValueError("with a parameter_map a checkpoint is of a job that has started: call broadcast(model).")
        plan = self._prepared(()).plan if inside.engine is None else inside.engine.plan
        workers, known = self._connect().size, parameter_map or self._map
        return KerasSide(self, inside.inner, inside.state, found, plan, workers, graph, inside.carried, known)

    @property
    def bytes_sent(self) -> int:
        """Bytes that this worker has handed to Horovod for sums since it started (not what a ring makes of them)."""
        return 0 if self._inside.engine is None else self._inside.engine.bytes_sent

    def metrics(self) -> Metrics | None:
        """What the last outer step measured; None before the first one. Alike on all workers but for the last two.

        Raises:
            RuntimeError: constructed without metrics=True.
        """
        if not self._observing:
            raise RuntimeError("nothing is measured: construct SlowMo(..., metrics=True)")
        return None if self._inside.engine is None else self._inside.engine.metrics()

    # Within

    @property
    def engine(self) -> Engine:
        """What is traced; for the callback."""
        found = self._inside.engine
        assert found is not None, "there is one once the workers have started"
        return found

    def _prepare(self, variables: Sequence[Any], statistics: Sequence[Any], model: Any) -> Prepared:
        """Build, and lay out what travels."""
        if not variables:
            raise ValueError(
                "there are no variables: the model is not built. Where a worker may have no data, call the model on a "
                "batch before it is trained."
            )
        odd = [v for v in variables if not isinstance(v, keras.Variable)]
        if odd:
            raise TypeError(f"`variables` must be Keras variables, model.variables. Received: {type(odd[0]).__name__}")
        if self._map is not None and model is None:
            raise ValueError("with a parameter_map the layers must be known: call broadcast(model).")
        self.build([v for v in variables if v.trainable])
        given = {id(v) for v in variables}
        lacking = [v.path for v in self._trainable_variables if id(v) not in given]
        if lacking:
            raise ValueError(
                f"`variables` lacks what the optimizer trains: {', '.join(lacking)}. Give model.variables."
            )
        return self._prepared(statistics, model)

    def _prepared(self, statistics: Sequence[Any], model: Any = None) -> Prepared:
        """What travels, for an optimizer that is built."""
        if self._map is not None and model is not None:
            placed = mapped(model, self._map, self._trainable_variables)
        else:
            trained = {id(v) for v in self._trainable_variables}
            floating = [v for v in statistics if id(v) not in trained and tf.as_dtype(v.dtype).is_floating]
            moving = self._model_variables_moving_average if self.use_ema else ()
            placed = entries_of(self._trainable_variables, [*floating, *moving])
        return Prepared(
            self._map, self._inside.state, placed, lay_out(placed, self._buffers, None, self._map is not None)
        )

    @property
    def _buffers(self) -> Sequence[Any]:
        """The inner optimizer's that are averaged."""
        averaged = self.config.buffers == "average" and self.config.tau is not None
        return self._inside.inner.buffers if averaged else ()

    def _assembled(self, prepared: Prepared, graph: Graph | None, groups: Groups | None) -> Engine:
        """What is traced; that of before, traces and all, where nothing has changed."""
        inside, plan = self._inside, prepared.plan
        if self._map is None:
            groups = None
        if groups is not None:
            plan = lay_out(prepared.placed, self._buffers, groups, one_device=True)
            inside.state.regroup(len(groups.own), self._variables)
        before = inside.engine
        if (
            before is not None
            and before.graph is graph
            and before.groups == groups
            and [id(v) for v in before.plan.variables] == [id(v) for v in plan.variables]
        ):
            return before
        inside.engine = Engine(
            self,
            inside.inner,
            inside.state,
            self._connect(),
            inside.node,
            graph,
            plan,
            groups,
            observing=self._observing,
        )
        inside.join = make_join(inside.engine)
        return inside.engine

    def _connect(self) -> Comm:
        inside = self._inside
        if inside.comm is None:
            inside.comm = workers.connect(self._process_set)
            if self.config.gradients == "node":
                inside.node = workers.connect_node() if inside.comm.size > 1 else SoloComm()
        return inside.comm

    def _likely_nodes(self) -> list[list[int]] | None:
        """Which ranks are whose node's, before anything is exchanged: what is kept depends on their number only."""
        size, node = self._connect().size, self._inside.node
        return None if node is None or size == 1 else consecutive_nodes(size, node.size)

    def _agreed_graph(self) -> Graph | None:
        """The graph that all workers have. A collective."""
        inside = self._inside
        if inside.graph is not None:
            graph = agreed_graph(self.config, self._connect(), inside.node, self.name)
            if graph.digest != inside.graph.digest:  # ranks are not consecutive within nodes
                inside.graph = graph
        return inside.graph

    def _ready(self) -> Engine:
        """The engine, where all is well for a trace or a call of one."""
        refuse_strategies()
        inside = self._inside
        with tf.init_scope():
            comm = self._connect()
            if comm.size == 1:
                return inside.engine or self._assembled(self._prepared(()), inside.graph, None)
        if not inside.started:
            raise ValueError(
                f"{comm.size} workers, and they have not been brought to one start. Give fit() a SlowMoCallback(), or "
                "call optimizer.broadcast(model.variables) before the first gradient."
            )
        if tf.inside_function() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise ValueError(
                "XLA can't compile the exchange between workers. Compile the model with jit_compile=False, or give "
                "fit() a SlowMoCallback(), which sees to it."
            )
        assert inside.engine is not None, "started with one"
        return inside.engine

    def _refuse_if_left(self) -> None:
        if self._inside.left:
            left = list(self._inside.left)
            raise RuntimeError(f"ranks {left} have left in join(leaving=True): nothing can be averaged.")

    def _refuse_within_average(self, what: str) -> None:
        if self._inside.averaging:
            raise RuntimeError(f"{what} within averaged_parameters(): the parameters there are not this worker's own.")


class _Inside:
    """What Keras must not look into: it would take every variable that it finds for the optimizer's own."""

    def __init__(self, inner: Inner) -> None:
        self.inner = inner
        self.state: Any = None  # once built
        self.comm: Comm | None = None
        self.node: Comm | None = None
        self.graph: Graph | None = None  # over a gossip base
        self.engine: Engine | None = None
        self.join: Any = None
        self.model: Any = None  # a weak reference to the one that SlowMoCallback trains
        self.given: list[Any] = []  # the variables of the start
        self.carried = Carried()  # of the checkpoint that was loaded last
        self.started = False
        self.averaging = False  # within averaged_parameters()
        self.left: tuple[int, ...] = ()  # ranks that have left for good


@keras.saving.register_keras_serializable(package="hvd_slowmo", name="ScaledSlowMo")
class _ScaledSlowMo(SlowMo, keras.optimizers.LossScaleOptimizer):
    """SlowMo around a LossScaleOptimizer. To Keras it is one, so that compile() does not wrap another around it."""

    # A scaler's are its inner optimizer's. SlowMo has its own, as around any other.
    learning_rate = keras.optimizers.Optimizer.learning_rate
    iterations = keras.optimizers.Optimizer.iterations
