"""SlowMo as a Keras optimizer around any other."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from typing_extensions import Unpack

from hvd_slowmo.checkpoint import job as checkpoint
from hvd_slowmo.checkpoint.facts import parse, parse_config
from hvd_slowmo.checkpoint.job import AnyPath
from hvd_slowmo.comm.launcher import elastic
from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.layout import CHUNK_BYTES
from hvd_slowmo.core.regroup.join import JoinResult
from hvd_slowmo.core.start.arguments import (
    Outermost,
    check_name,
    check_parameter_map,
    check_workers,
    configured,
    refuse_in_elastic_job,
)
from hvd_slowmo.core.start.choice import check_statistics
from hvd_slowmo.core.start.handshake import RESTART_FACT, agree
from hvd_slowmo.core.step.metrics import Metrics
from hvd_slowmo.errors import CheckpointError, spell_error
from hvd_slowmo.settings import SlowMoSettings
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_tf.callers import refuse_foreign_broadcasts
from hvd_slowmo_tf.checks import (
    SavedOptimizer,
    check_inner,
    check_together,
    refuse_strategies,
    resolved,
    saved_values,
)
from hvd_slowmo_tf.inner_optimizer import InnerOptimizer
from hvd_slowmo_tf.model.layout import parts_of, travelling
from hvd_slowmo_tf.startup import start_together
from hvd_slowmo_tf.traces.in_place import compiled
from hvd_slowmo_tf.traces.traced_step import Gradients
from hvd_slowmo_tf.worker import KerasWorker


@keras.saving.register_keras_serializable(package="hvd_slowmo", name="SlowMo")
class SlowMo(Outermost, keras.optimizers.Optimizer):
    """Slow momentum (Wang et al., ICLR 2020, arXiv 1910.00643, Algorithm 1) around a Keras optimizer.

    A keras.optimizers.Optimizer: `model.compile(SlowMo(inner_optimizer, config), ...)`, or `apply` in a custom training
    loop. Every update is one inner step; every `config.tau` of them the workers average their parameters and take a
    momentum step. All state is in `variables`.

    Nothing is exchanged before `SlowMoCallback`, or `broadcast` in a custom training loop, has brought all workers to
    the same start; both are collectives.

    The learning rate (with its schedule), gradient accumulation and the moving average of the weights move from the
    inner optimizer to this one: its `iterations` count every call, those of an overflow too. Clipping, weight decay and
    loss scaling stay with the inner optimizer. Under "mixed_float16" wrap the scaler:
    `SlowMo(keras.optimizers.LossScaleOptimizer(inner), config)`.

    Args:
        inner_optimizer: any Keras optimizer, or its name or config, as in `compile`.
        config: the settings; None for SlowMoConfig's defaults, or for its fields as keywords: SlowMo("adam", tau=12).
        process_set: the Horovod process set that trains together; None for all ranks. Not part of a saved model.
        comm: workers that take the place of Horovod's, on tensors of a trace; with gradients="node" it brings the
            node's workers as `comm.node`. Not part of a saved model.
        name: prefix of the collectives' names; a second optimizer in one process takes another.
        metrics: measure at every outer step, for `metrics()`; costs about as much as the outer update itself.
        parameter_map: names of the tensors in other frameworks, to train together with their workers. Every worker
            gives the same map; `ParameterMap()` for models with the same layers in the same order. Not part of a saved
            model.
        statistics: variables that are not trained, by patterns of their paths, with or without Keras' numbers (as in
            `fnmatch`), and whether outer steps and joins average them; by itself that are the floating-point ones of
            layers that are not frozen, or of the list that `broadcast` is given. The last pattern that fits decides:
            {"*/queue": False, "teacher/*": True}.

    Attributes:
        worker: this worker's part apart from Keras; internal.

    Raises:
        TypeError, ValueError: an argument is wrong.

    Example:
        >>> import numpy as np
        >>> import hvd_slowmo.tf as slowmo
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> optimizer = slowmo.SlowMo(keras.optimizers.SGD(0.1), slowmo.SlowMoConfig(tau=2))
        >>> model.compile(optimizer, "mse")
        >>> x, y = np.ones((8, 3)), np.ones((8, 1))
        >>> history = model.fit(x, y, batch_size=2, verbose=0, callbacks=[slowmo.SlowMoCallback()])
        >>> optimizer.steps
        4
    """

    _chunk_bytes = CHUNK_BYTES  # the greatest length of a message; tests shorten it

    def __new__(cls, inner_optimizer: Any = None, *args: Any, **kwargs: Any) -> Any:
        scaled = isinstance(resolved(inner_optimizer), keras.optimizers.LossScaleOptimizer)
        return super().__new__(_ScaledSlowMo if scaled and cls is SlowMo else cls)

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str | dict[str, Any],
        config: SlowMoConfig | None = None,
        *,
        process_set: Any = None,
        comm: Comm | None = None,
        name: str = "slowmo",
        metrics: bool = False,
        parameter_map: ParameterMap | None = None,
        statistics: Mapping[str, bool] | None = None,
        **settings: Unpack[SlowMoSettings],
    ) -> None:
        config = configured(SlowMo, config, settings)
        if comm is None and elastic():
            refuse_in_elastic_job(config, parameter_map, process_set=process_set)
        check_name(name)
        check_parameter_map(parameter_map)
        check_statistics(statistics, parameter_map)
        check_workers(config, comm, process_set=process_set)
        refuse_strategies()
        inner_optimizer = resolved(inner_optimizer)
        check_inner(inner_optimizer)
        inner = InnerOptimizer(inner_optimizer)
        check_together(inner, config, parameter_map)
        keras.optimizers.Optimizer.__init__(self, name=name, **inner.moved)
        self.inner_optimizer = inner_optimizer
        self.config = config
        self.worker = KerasWorker(self, inner, parameter_map, process_set, comm, metrics, statistics)

    # Keras' contract of an optimizer

    @property
    def variables(self) -> list[keras.Variable]:
        refuse_foreign_broadcasts()
        return [*self._variables, *self.inner_optimizer.variables]

    @property
    def loss_scale_factor(self) -> float | None:
        return self.inner_optimizer.loss_scale_factor  # type: ignore[no-any-return]

    @loss_scale_factor.setter
    def loss_scale_factor(self, value: Any) -> None:
        """Ignore the value: Keras' own constructor sets it; see __setattr__."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Only a scaler around this optimizer does that, with None: Keras calls no setter where nothing changes.
        if name == "loss_scale_factor" and "worker" in self.__dict__:
            raise ValueError(
                "a LossScaleOptimizer around SlowMo would skip whole steps on one worker alone (compile() makes one "
                "under 'mixed_float16'). Put it within: "
                "SlowMo(keras.optimizers.LossScaleOptimizer(inner_optimizer), config)"
            )
        super().__setattr__(name, value)

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        return self.inner_optimizer.scale_loss(loss)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        self.worker.inner.innermost.exclude_from_weight_decay(var_list, var_names)

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Make all variables. No communication."""
        if not self.built:
            with tf.init_scope():
                once = list({id(v): v for v in variables}.values())
                keras.optimizers.Optimizer.build(self, once)
                self.worker.build(once)

    def apply(self, grads: Gradients, trainable_variables: Sequence[keras.Variable] | None = None) -> None:
        """Take one step: the inner optimizer's, and the outer step where it is due.

        Args:
            grads: a gradient per variable: a tensor, IndexedSlices or None.
            trainable_variables: the variables; those of `build` if None.

        Raises:
            ValueError: on every rank at an outer step, if parameters or learning rates are not finite on one of them or
                the ranks have not made the same number of steps; nothing is written then. Within a tf.function of the
                caller it is a tf.errors.InvalidArgumentError with the same facts. Also if several workers have not
                been brought to one start, and if XLA compiles this call.
        """
        grads = list(grads)
        if not grads:
            return
        if trainable_variables is None:
            if not self.built:
                raise ValueError("the optimizer has no variables yet: pass them, or call build(variables) first.")
            trainable_variables = self._trainable_variables
        trainable_variables = list(trainable_variables)
        self.worker.refuse_before_start()
        self.build(trainable_variables)
        if self.worker.only_builds:
            return
        self._check_variables_are_known(trainable_variables)
        step = self.worker.ready()
        self.worker.refuse_while_averaging("apply()")
        by_number = {self._get_variable_index(v): g for v, g in zip(trainable_variables, grads, strict=True)}
        ordered = [by_number.get(number) for number in range(len(self._trainable_variables))]
        if all(g is None for g in ordered):
            raise ValueError("no gradient for any variable: all of them are None.")
        if tf.inside_function():
            step.function(ordered, step.exchange_pending(ordered), compiled())
        else:
            self.worker.call(step.function, ordered)

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        if self.use_ema:
            keras.optimizers.Optimizer.finalize_variable_values(self, var_list)
        else:
            self.inner_optimizer.finalize_variable_values(var_list)

    def save_own_variables(self, store: MutableMapping[str, NDArray[Any]]) -> None:
        # The inner optimizer's are saved with it: it is an attribute.
        for number, v in enumerate(self._variables):
            is_word = self.built and v is self.worker.variables.entered
            store[str(number)] = np.int64(self.worker.fingerprint.told()) if is_word else v.numpy()

    def load_own_variables(self, store: MutableMapping[str, NDArray[Any]]) -> None:
        if not self.built:  # weights may well be loaded for another training than the one that they come from
            warnings.warn(
                "SlowMo's part of the file is not loaded: this optimizer has no variables yet. To resume that "
                "training, call optimizer.build(model.trainable_variables) first.",
                stacklevel=2,
            )
            return
        values = saved_values(store, self._variables, self.worker.variables.scalars)
        for v, value in zip(self._variables, values, strict=True):
            v.assign(value)
        self.worker.fingerprint.follow_loaded()

    def get_config(self) -> dict[str, Any]:
        rate = keras.optimizers.Optimizer.get_config(self)["learning_rate"]
        return {
            "name": self.name,
            "inner_optimizer": self.worker.inner.serialized(rate),
            "config": json.loads(json.dumps(self.config.facts())),  # lists for tuples, which Keras would wrap
            "metrics": self.worker.observe,
            "statistics": self.worker.statistics,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> SlowMo:
        saved = parse(config, SavedOptimizer, "the config of SlowMo")
        settings = parse_config(saved.config, "the config of SlowMo")
        try:
            # Keras' safe mode, which is on by default, refuses code such as that of a Lambda.
            inner = keras.saving.deserialize_keras_object(saved.inner_optimizer, custom_objects=custom_objects)
            check_inner(inner)
            return SlowMo(inner, settings, name=saved.name, metrics=saved.metrics, statistics=saved.statistics)
        except Exception as error:  # Keras lets through anything about a damaged config
            raise CheckpointError(f"SlowMo can't be made from its config: {spell_error(error)}") from error

    # SlowMo's additions

    @property
    def steps(self) -> int:
        """Inner steps (updates) completed since construction, or since the run that was resumed began."""
        return self.worker.steps

    @property
    def bytes_sent(self) -> int:
        """Bytes that this worker has handed to Horovod for sums since it started; a ring sends up to twice as many."""
        return self.worker.bytes_sent

    def metrics(self) -> Metrics | None:
        """Return the measurements of the last outer step; None before the first one.

        `residual`, `local`, `seconds_waited`, `hidden` and `bytes_sent` are this worker's own, the others equal on all.

        Raises:
            RuntimeError: constructed without metrics=True.
        """
        return self.worker.metrics()

    def broadcast(self, variables: keras.Model | Sequence[keras.Variable]) -> None:
        """Bring all workers to one start. A collective, before the first gradient is taken.

        The workers compare their settings and variables. If none has made a step, or rank 0 alone has (it has loaded a
        checkpoint), all get rank 0's variables and optimizer state. If all are at the same step, each has restored its
        own file and is left as it is.

        With workers of another framework all start at step 0. The optimizer's state and the variables that the map
        does not show come from the first worker that has Keras, all else from rank 0.

        Args:
            variables: the model, which is needed with a parameter_map; or all of its variables, `model.variables`.
                Floating-point variables that the optimizer does not train (BatchNorm's statistics) are averaged at
                outer steps and joins too, those of frozen layers only if variables are given: leave these out. The
                state of seed generators stays each worker's own.

        Raises:
            TypeError, ValueError: on every rank, if settings, variables or steps differ.

        Example:
            >>> variable = keras.Variable([1.0, 2.0])
            >>> optimizer = SlowMo(keras.optimizers.SGD(0.5), SlowMoConfig(tau=2))
            >>> optimizer.broadcast([variable])
            >>> optimizer.apply([tf.constant([2.0, 2.0])], [variable])
            >>> variable.numpy().tolist()
            [0.0, 1.0]
        """
        model = variables if isinstance(variables, keras.Model) else None
        # A layer that two models share is in the variables of both.
        once = [] if model is not None else list({id(v): v for v in variables}.values())
        found, statistics = (once, once) if model is None else parts_of(model)
        start_together(self.worker, found, statistics, model)

    def join(
        self, variables: keras.Model | Sequence[keras.Variable] | None = None, *, leaving: bool = False
    ) -> JoinResult:
        """Wait for workers with more data, and leave all with the workers' mean. A collective.

        Use it at the end of an epoch, before evaluating and before saving on rank 0. `steps` and `iterations` become
        those of the worker with the most steps.

        Args:
            variables: None, or the variables that were given to `broadcast`, which are checked; or the model.
            leaving: this worker stops for good; the others find its rank in `JoinResult.left`.

        Raises:
            ValueError: as in `apply`, on every rank.
        """
        worker = self.worker
        worker.refuse_while_averaging("join()")
        worker.refuse_if_left()
        known = {id(v) for v in travelling(worker.ready().assembly.layout)}
        given = () if variables is None or isinstance(variables, keras.Model) else variables
        missing = [v.path for v in given if tf.as_dtype(v.dtype).is_floating and id(v) not in known]
        if missing:
            raise ValueError(f"broadcast() was not given {', '.join(missing)}: join() can't average them.")
        if worker.comm.size == 1:
            worker.complete()
            worker.fingerprint.joined(worker.fingerprint.differs(), leaving)
            return JoinResult(0, worker.comm.ranks if leaving else ())
        before = self.steps
        left = worker.join(leaving)
        return JoinResult(self.steps - before, left)

    def restart(self) -> None:
        """Begin anew from rank 0's parameters and statistics, without momentum. A collective.

        Call it on every rank after values were loaded into the model: they are no progress of a block.

        Raises:
            ValueError: on every rank, if the workers are not at the same step.

        Example:
            >>> variable = keras.Variable([1.0, 2.0])
            >>> optimizer = SlowMo(keras.optimizers.SGD(0.5), SlowMoConfig(tau=2))
            >>> optimizer.broadcast([variable])
            >>> values = variable.assign([3.0, 4.0])
            >>> optimizer.restart()
        """
        self.worker.refuse_while_averaging("restart()")
        self.worker.refuse_if_left()
        self.worker.ready()
        agree(self.worker.comm, {RESTART_FACT: self.steps}, {}, None)
        self.worker.restart()

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Let the model hold the workers' mean, statistics included, within a with statement.

        A collective: every rank enters it, after the same step. Afterwards each has its own values back; their copy
        takes the model's size in memory.

        Raises:
            ValueError: on every rank, if one is elsewhere or its parameters are not finite.

        Example:
            >>> variable = keras.Variable([1.0, 2.0])
            >>> optimizer = SlowMo(keras.optimizers.SGD(0.5), SlowMoConfig(tau=2))
            >>> optimizer.broadcast([variable])
            >>> with optimizer.averaged_parameters():
            ...     variable.numpy().tolist()
            [1.0, 2.0]
        """
        worker = self.worker
        worker.refuse_while_averaging("averaged_parameters()")
        worker.refuse_if_left()
        with worker.holding_mean():
            yield

    def save(
        self, path: AnyPath, model: keras.Model | None = None, *, parameter_map: ParameterMap | None = None
    ) -> None:
        """Write the whole job's state, the model's included, to a file that PyTorch can read too. A collective.

        docs/checkpoints.md describes the files. `load` on as many workers is a bitwise identical resume.

        Args:
            path: the same on every rank, in an existing directory that all ranks see. Files for the state of single
                ranks stand beside it.
            model: the Keras model. None: the one that SlowMoCallback trains or, in a custom training loop, the
                variables that were given to `broadcast`, by their order, which PyTorch can't read.
            parameter_map: None for the automatic one or, where there is none, the order of the variables.

        Raises:
            ValueError: on every rank, if one can't save or the ranks are not at the same step. A checkpoint that was
                there before is whole then.
        """
        checkpoint.save(self.worker.state_maker(model, parameter_map), self.worker.comm, path)

    def load(
        self, path: AnyPath, model: keras.Model | None = None, *, parameter_map: ParameterMap | None = None
    ) -> None:
        """Continue from a checkpoint of `save`, of either framework: the model's values too. A collective.

        Call it before `fit`, or after `broadcast` in a custom training loop.

        Args:
            path, model, parameter_map: as in `save`.

        Raises:
            ValueError: on every rank, if a file is damaged or does not fit on one; nothing was changed.
        """
        self.worker.refuse_if_left()
        checkpoint.load(lambda: self.worker.state(model, parameter_map), self.worker.comm, path)
        self.worker.traces.resend_statistics()
        self.worker.fingerprint.follow_loaded()


@keras.saving.register_keras_serializable(package="hvd_slowmo", name="ScaledSlowMo")
class _ScaledSlowMo(SlowMo, keras.optimizers.LossScaleOptimizer):
    """SlowMo around a LossScaleOptimizer; to Keras it is one, so that compile() does not wrap another around it."""

    # A scaler's are its inner optimizer's. SlowMo has its own, as around any other.
    learning_rate = keras.optimizers.Optimizer.learning_rate
    iterations = keras.optimizers.Optimizer.iterations
