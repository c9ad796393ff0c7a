"""A Keras worker's part when survivors and new workers come together."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.core.parts.layout import Layout
from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.core.parts.slices import OwnSlices
from hvd_slowmo.core.regroup.dealing import FormerSlices
from hvd_slowmo.core.regroup.member import BrokenOff
from hvd_slowmo.core.regroup.membership import Reformed, come_together
from hvd_slowmo.core.regroup.places import Place
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.core.start.startup import Description, Job
from hvd_slowmo.core.step.machine import Machine
from hvd_slowmo_tf.horovod import HorovodComm
from hvd_slowmo_tf.model.layout import VariableRef
from hvd_slowmo_tf.startup import StartingKerasWorker
from hvd_slowmo_tf.traces.traced_step import TracedStep
from hvd_slowmo_tf.worker import KerasWorker


class KerasMember(StartingKerasWorker):
    """`hvd_slowmo.core.regroup.member.Member` of a Keras optimizer. Nothing here is traced."""

    elastic = True

    @property
    def machine(self) -> Machine:
        return self._assembled_step.assembly.machine

    def place(self) -> Place:
        if self._worker.job is None:
            return Place(framework=self.framework)
        variables = self._worker.variables
        now = variables.now
        step = int(now.step)
        made = int(variables.made.numpy()) == step + 1
        written = tuple(sorted(self._worker.written or ()))
        owner = variables.owner if self.config.sliced_vectors else None
        launched = tuple(now.flight.launched.tolist())
        answers = self._worker.broken_off.answered == step and not made
        return Place(True, step, made, written, launched, owner, self._worker.broken_off.torn, self.framework, answers)

    @property
    def broken_off(self) -> BrokenOff:
        return self._worker.broken_off

    def reassemble(self, description: Description[VariableRef], graph: Graph | None) -> None:
        worker = self._worker
        if self.config.sliced_vectors:
            self._divide(description.layout.layout)
        if graph is not None:
            worker.variables.gossip_over(graph, worker.optimizer._variables)
        self.assemble(description, graph)
        self.machine.meetings.written = worker.written
        initial = self.machine.initial()
        if worker.job is None:
            self.write_progress(initial)
        else:
            worker.variables.write(self.read_progress()._replace(mixing=initial.mixing))

    def _divide(self, layout: Layout) -> None:
        """Make room for the slices that this worker has among the present ones; those of former ones are kept."""
        worker, variables = self._worker, self._worker.variables
        if worker.job is not None and worker.former_slices is None:
            kept = {name: {n: tf.identity(v) for n, v in each.items()} for name, each in variables.slices.items()}
            worker.former_slices = FormerSlices(variables.owner, lambda name, chunk: kept[name][chunk])
        own = OwnSlices(self.config, layout, worker.comm.rank, worker.comm.size)
        variables.divide(own, worker.optimizer._variables)

    def former_slices(self) -> FormerSlices | None:
        return self._worker.former_slices

    def forget_former_slices(self) -> None:
        worker = self._worker
        worker.former_slices = None
        worker.variables.belong_to(worker.comm.rank, worker.comm.size)

    def read_progress(self) -> Progress:
        return self._worker.variables.read()

    def write_progress(self, progress: Progress, interrupted: bool = False) -> None:
        variables, optimizer = self._worker.variables, self._worker.optimizer
        variables.write(progress)
        step = int(variables.now.step)
        variables.made.assign(step + interrupted)
        optimizer._iterations.assign(step * (optimizer.gradient_accumulation_steps or 1))
        if optimizer.gradient_accumulation_steps:  # the batches since the last update are taken once more
            for accumulator in optimizer._accumulated_gradients:
                accumulator.assign(tf.zeros(accumulator.shape, accumulator.dtype))

    def count_step(self) -> None:
        self.write_progress(self.machine.count(self.read_progress(), self._assembled_step.rates()))

    def finish_step(self) -> None:
        self._assembled_step.finish()

    def _own(self, job: Job) -> list[keras.Variable]:
        """Return the variables that the chunks do not carry; those of the vectors are handed out as such."""
        variables = self._worker.variables
        kept = *variables.vectors.values(), *variables.slices.values()
        vectors = {id(v) for chunks in kept for v in chunks.values()}
        return [v for v in super()._own(job) if id(v) not in vectors]

    @property
    def _assembled_step(self) -> TracedStep:
        assert self._step is not None, "assembled before"
        return self._step


def reform(
    worker: KerasWorker,
    comm: Comm,
    variables: list[keras.Variable],
    statistics: Sequence[keras.Variable],
    model: keras.Model | None,
) -> Reformed:
    """Bring an optimizer's worker together with the present workers. A collective of all of them.

    Args:
        worker: of the optimizer.
        comm: the present workers.
        variables, statistics, model: as in `hvd_slowmo_tf.startup.start_together`.

    Raises:
        TypeError, ValueError: as `hvd_slowmo.core.regroup.membership.come_together`.
    """
    worker.reassemble(comm)
    worker.connection.take_name()
    worker.trained.remember(model, variables)
    try:
        reformed = come_together(KerasMember(worker, variables, statistics, model), worker.comm)
    except (tf.errors.UnknownError, tf.errors.FailedPreconditionError) as error:
        if isinstance(comm, HorovodComm):
            raise comm.failures.explain(error) from error
        raise
    worker.job = reformed.job
    worker.variables.belong_to(worker.comm.rank, worker.comm.size)
    return reformed
