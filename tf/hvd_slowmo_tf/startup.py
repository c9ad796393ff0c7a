"""A Keras worker's part in the start: its description, and the state that it gives to others and takes from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import keras
import tensorflow as tf

from hvd_slowmo.core.average.broadcast import take_from
from hvd_slowmo.core.parts.layout import ParameterGroups
from hvd_slowmo.core.start.arguments import check_metrics
from hvd_slowmo.core.start.bulk import Body, Carrier, Gift
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.core.start.handshake import agreed
from hvd_slowmo.core.start.startup import Description, Job, start
from hvd_slowmo_tf.checks import check_model_variables
from hvd_slowmo_tf.model.bulk import KerasCarrier, in_place, on_wire
from hvd_slowmo_tf.model.layout import VariableRef, travelling
from hvd_slowmo_tf.model.statistics import chosen_statistics
from hvd_slowmo_tf.traces.failed_traces import without_values
from hvd_slowmo_tf.traces.traced_step import TracedStep
from hvd_slowmo_tf.worker import KerasWorker


def start_together(
    worker: KerasWorker,
    variables: list[keras.Variable],
    statistics: Sequence[keras.Variable],
    model: keras.Model | None = None,
) -> None:
    """Bring all workers to one start. A collective.

    Args:
        worker: of the optimizer.
        variables: all of the model's, or of the part of it that the optimizer trains.
        statistics: variables among them that may be averaged without being trained.
        model: if it was given itself.

    Raises:
        TypeError, ValueError: on every rank, if settings, variables or steps differ.
    """
    worker.refuse_before_elastic_start()
    if worker.elastic:
        return  # in `slowmo.elastic.State.sync`
    worker.connection.take_name()
    worker.trained.remember(model, variables)
    worker.job = start(StartingKerasWorker(worker, variables, statistics, model), worker.comm)
    worker.left = ()
    worker.fingerprint.forget()


def fail_together(worker: KerasWorker, error: Exception) -> NoReturn:
    """Raise an error that this worker has met before its start; the others, in theirs, raise a ValueError with it."""

    def fail() -> tuple[None, dict[str, Any]]:
        raise error

    agreed(worker.comm.handshake, fail, {})
    raise AssertionError("agreed() raises the error")


class StartingKerasWorker:
    """`hvd_slowmo.core.start.startup.StartingWorker` of a Keras optimizer.

    Args:
        worker: of the optimizer.
        variables: all of the model's.
        statistics: variables among them that may be averaged without being trained.
        model: if it was given itself.
    """

    framework = "Keras"
    whole_in_flight = True  # variables do not come and go
    elastic = False

    def __init__(
        self,
        worker: KerasWorker,
        variables: Sequence[keras.Variable],
        statistics: Sequence[keras.Variable],
        model: keras.Model | None,
    ) -> None:
        self.config, self.parameter_map = worker.config, worker.parameter_map
        self.started_before = worker.job is not None
        self.carrier: Carrier = KerasCarrier(worker)
        self.remarks: Mapping[str, Any] = {
            "TensorFlow": tf.__version__,
            "Keras": keras.__version__,
            "the inner optimizer": type(worker.inner.innermost).__name__,
        }
        self._worker = worker
        self._model_variables = variables
        self._statistics = statistics
        self._model = model
        self._refs: list[VariableRef] = []
        self._step: TracedStep | None = None

    def describe(self) -> Description[VariableRef]:
        worker = self._worker
        check_metrics(worker.observe)
        check_model_variables(self._model_variables, self._model, self.parameter_map is not None)
        empty = without_values(list(self._model_variables))
        if empty:
            raise ValueError(
                f"{len(empty)} variables have no values, the first is {empty[0].path}: the fit() or the function that "
                "made them has failed in its first trace. Make the model anew."
            )
        worker.optimizer.build([v for v in self._model_variables if v.trainable])
        known = {id(v) for v in self._model_variables}
        missing = [v.path for v in worker.optimizer._trainable_variables if id(v) not in known]
        if missing:
            raise ValueError(
                f"`variables` lacks some that the optimizer trains: {', '.join(missing)}. Give model.variables."
            )
        trained = worker.optimizer._trainable_variables
        constrained = [v for v in trained if v.constraint is not None]
        if constrained and self.parameter_map is not None:
            raise ValueError(
                "with PyTorch workers a variable can't have a constraint, which they would not apply: "
                f"{constrained[0].path} has {type(constrained[0].constraint).__name__}. Take constraints off, or use "
                "Keras workers alone."
            )
        choice = worker.statistics or {}
        statistics = chosen_statistics(self._model_variables, self._statistics, trained, choice)
        self._refs = worker.travelling.refs(statistics, self._model)
        specs = [ref.spec for ref in self._refs]
        groups = ParameterGroups.single(sum(spec.role == "parameter" for spec in specs))
        return Description(specs, groups, worker.travelling.layout_of(self._refs))

    def position(self) -> tuple[int, int, int | None]:
        variables = self._worker.variables
        slices_of = int(variables.rank.numpy()) if variables.slices else None
        return int(variables.now.step), int(variables.workers.numpy()), slices_of

    def entered(self) -> bool:
        return self._worker.fingerprint.differs()

    def assemble(self, description: Description[VariableRef], graph: Graph | None) -> None:
        self._step = self._worker.assemble(description.layout, description.groups, graph)

    def frozen(self) -> dict[str, Body]:
        return {ref.spec.name: on_wire(ref) for ref in self._frozen}

    def own(self, job: Job) -> Gift:
        # By number, since the names of an optimizer's variables have Keras' numbers in them.
        return Gift({f"variable {number}": in_place(v) for number, v in enumerate(self._own(job))})

    def take(self, values: Any) -> None:
        """Do nothing: all are variables."""

    def first_vectors(self, job: Job) -> None:
        worker, variables = self._worker, self._worker.variables
        assert self._step is not None, "assembled before"
        machine = self._step.assembly.machine
        if job.fresh:
            worker.call(lambda: variables.write(machine.start()))
        elif job.entered:  # also of a single worker, which is always the first to have a state
            worker.restart(job.entered)
        elif job.restored_first:
            worker.call(lambda: take_from(machine.runtime, 0, ("parameter", "statistic", "optimizer_state")))
            worker.call(lambda: variables.write(machine.reset(variables.read())))
        variables.belong_to(worker.comm.rank, worker.comm.size)

    @property
    def _frozen(self) -> list[VariableRef]:
        return [ref for ref in self._refs if ref.spec.role == "frozen"]

    def _own(self, job: Job) -> list[keras.Variable]:
        """Return the variables that the chunks do not carry: the model's others, and the optimizer's state."""
        assert self._step is not None, "assembled before"
        carried = [*travelling(self._step.assembly.layout), *(ref.variable for ref in self._frozen)]
        ids = {id(v) for v in carried}
        # Seed generators keep their own stream on every worker.
        others = [v for v in self._model_variables if id(v) not in ids and v.name != "seed_generator_state"]
        optimizer = self._worker.optimizer
        if not job.fresh:
            return [*others, *optimizer.variables]
        rate = [optimizer._learning_rate] if isinstance(optimizer._learning_rate, keras.Variable) else []
        return [*others, *self._worker.inner.optimizer.variables, *rate]
