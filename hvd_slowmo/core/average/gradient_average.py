"""Averaging gradients over workers at a step: AR-SGD, averages within nodes, and the warm-up of the other methods.

Chunks go in the order in which backward completes gradients, last parameters first, so an adapter can send them while
backward still runs. The last message is a vector with the attendance: who trains, and who has a gradient for which
parameter. A worker in a join sends zeros and counts as none; a parameter without a gradient on any worker keeps none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import NDArray

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core.average.broadcast import average_chunks
from hvd_slowmo.core.average.ledger import entry_text, misfit_text, own_row
from hvd_slowmo.core.parts import names
from hvd_slowmo.core.parts.progress import Scalar, Vector
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.parts.schedule import StepPlan
from hvd_slowmo.core.parts.store import GradientSource


class Presence(NamedTuple):
    """One worker's part of an attendance.

    Attributes:
        training: 1, or 0 in a join: then there are no gradients here.
        leaving: 1 if this worker joins for the last time.
        rates: float64 (G,): its learning rates.
    """

    training: Scalar
    leaving: Scalar
    rates: Vector


class Attendance(NamedTuple):
    """The workers that took part in one exchange of gradients."""

    training: Scalar  # number of workers that train
    leaving: Vector  # (workers,): 1 for those that join for the last time
    first: Scalar  # rank of the first worker that trains
    rates: Vector  # (G,): its learning rates


_ROW = ("training", "leaving", "rank", "misfit", "entered", "ending", "regroups")
"""A worker's row of the attendance; its learning rates stand behind it. The last four as in a ledger's `Row`."""


class GradientAverage:
    """Exchanges of gradients among some workers, one per step: `send_next` any number of times, `send_rest`, `finish`.

    It remembers from one join to the next whether a worker has been behind, and whom to catch up from.

    Args:
        runtime: of this worker.
        comm: the workers that average.
    """

    def __init__(self, runtime: Runtime, comm: ScopedComm) -> None:
        self.comm = comm
        self.chunks = list(reversed(runtime.layout.parameter_chunks))
        self._ops = runtime.ops
        self._runtime = runtime
        self._groups = runtime.layout.group_count
        self._handles: list[Any] = []
        self._attendance: Any = None
        self.stragglers = runtime.ops.cell(False)  # whether a worker was done before others, since the last join
        self.catch_up_from = runtime.ops.cell(0)  # rank in `comm` of a worker that was not
        self.entered = runtime.ops.cell(False)  # whether the last exchange has told of values from outside
        self.other: GradientAverage | None = None  # the exchange of the other phase, if there are two

    @property
    def sent(self) -> int:
        """Number of chunks in flight."""
        return len(self._handles)

    def send_next(self, source: GradientSource) -> None:
        """Start the next chunk; its gradients are complete."""
        chunk = self.chunks[len(self._handles)]
        self._handles.append(self.comm.start_sum(names.gradient(chunk.index), source.read(chunk)))

    def send_rest(self, source: GradientSource, presence: Presence) -> None:
        """Start all that has not been sent. Other exchanges of this worker may begin before `finish`."""
        while len(self._handles) < len(self.chunks):
            self.send_next(source)
        row = own_row(
            self._ops,
            self.comm.rank,
            self.comm.size,
            (
                presence.training,
                presence.leaving,
                self.comm.rank,
                source.misfit(),
                source.entered(),
                self._runtime.roll.ending(),
                self._runtime.regrouping.heard.get(),
            ),
            presence.rates,
        )
        self._attendance = self.comm.start_sum(names.PRESENT, self._ops.pack([*row, source.present()]))

    def finish(self, source: GradientSource) -> Attendance:
        """Set every gradient to the mean over the workers that train.

        Raises:
            ValueError: on every worker, if a model has another form; nothing is written and nothing is in flight.
        """
        handles, self._handles = self._handles, []
        ops, size, width = self._ops, self.comm.size, len(_ROW) + self._groups
        everyone = ops.unpack(self.comm.wait(self._attendance))
        table = ops.reshape(everyone[: size * width], (size, width))
        if self._runtime.watches:
            misfits = ops.sum(ops.where(table[:, 3] == 0, 0.0, 1.0)) > 0
            if ops.keeps_handles and misfits:
                for handle in handles:
                    self.comm.wait(handle)
            everyone = ops.error_if(misfits, table, self._misfit_text, everyone)
        first = ops.argmax_row(table, 0)
        attendance = Attendance(ops.sum(table[:, 0]), table[:, 1], ops.to_int(first[2]), first[len(_ROW) :])
        source.admit(everyone[size * width :])
        count = ops.where(attendance.training > 0, attendance.training, 1.0)
        for chunk, handle in zip(self.chunks, handles, strict=True):
            total = self.comm.wait(handle)
            source.write(chunk, total / ops.cast_like(count, total))
        self._remember(attendance)
        if self.comm is self._runtime.comm:  # a node's workers alone must not act on the news
            self._runtime.roll.note_attendance(attendance.training, ops.sum(table[:, 5]))
            self._runtime.regrouping.agreed.set(ops.sum(table[:, 6]) > 0)
        if self._runtime.watches and self.comm is self._runtime.comm:
            entered = ops.sum(table[:, 4]) > 0
            ops.warn("entered", entered, table, self._entry_text)
            self.entered.set(self.entered.get() | entered)
        return attendance

    def exchange(self, source: GradientSource, presence: Presence) -> Attendance:
        """Average all gradients at once."""
        self.send_rest(source, presence)
        return self.finish(source)

    def forget(self) -> None:
        """Begin anew: all workers are equal."""
        self.stragglers.set(False)

    def _misfit_text(self, table: NDArray[Any]) -> str:
        # Not strict: a trace keeps its tables in the form of the ledger, filled up with zeros.
        rank, number = next((r, int(row[3])) for r, row in zip(self.comm.ranks, table, strict=False) if row[3])
        return misfit_text(self.comm.name, rank, f"{self._runtime.layout.names[number - 1]} has another form")

    def _entry_text(self, table: NDArray[Any]) -> str:
        where = [f"rank {r}" for r, row in zip(self.comm.ranks, table, strict=False) if row[4]]
        return entry_text(self.comm.name, where, "All workers take the mean")

    def _remember(self, attendance: Attendance) -> None:
        anyone = attendance.training > 0
        self.catch_up_from.set(self._ops.to_int(self._ops.where(anyone, attendance.first, self.catch_up_from.get())))
        self.stragglers.set(self.stragglers.get() | (anyone & (attendance.training < self.comm.size)))
        if self.other is not None:  # the warm-up has begun or ended: all begin there from equal parameters
            self.other.forget()


class GradientAverages:
    """The exchanges that a configuration has: among all workers and, with gradients="node", among a node's.

    Args:
        runtime: of this worker; `runtime.comm.node` are the node's workers.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.ever = runtime.config.gradients != "local" or runtime.config.warmup_steps > 0  # whether some step has one
        self.of_all = GradientAverage(runtime, runtime.comm)
        self.of_node = self.of_all
        if runtime.comm.node is not None:
            self.of_node = GradientAverage(runtime, runtime.comm.node)
            self.of_all.other, self.of_node.other = self.of_node, self.of_all

    def level(self) -> None:
        """Give all workers the mean of their parameters, if the last exchange has told of values from outside.

        Averaged gradients would leave the workers apart for ever. A collective then, before the inner step.
        """
        ops, runtime, entered = self._runtime.ops, self._runtime, self.of_all.entered

        def mean() -> Scalar:
            average_chunks(runtime, runtime.layout.parameter_chunks)
            entered.set(False)
            return ops.to_int(1.0)

        if runtime.watches:
            ops.cond(entered.get(), mean, lambda: ops.to_int(0.0))

    def of(self, plan: StepPlan) -> GradientAverage:
        """Return the exchange of a step; not in a trace."""
        return self.of_all if plan.all_gradients else self.of_node

    def due(self, plan: StepPlan) -> Scalar:
        """Return whether a step exchanges gradients with anybody."""
        if self.of_node.comm.size > 1:
            return plan.average_gradients
        return plan.average_gradients & plan.all_gradients if self.of_all.comm.size > 1 else False
