"""The state machine: what happens around a base step, on any framework.

State is two things. `Progress`, scalars passed by value through `start` and `tick`; and named vectors ("model",
"anchor", "v") that the adapter's `Store` owns and gives and takes a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from hvd_slowmo.comm import Comm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.layout import Chunk, Layout
from hvd_slowmo.ledger import AVERAGE, OUTER, Row, complaint, oddity, verdict
from hvd_slowmo.ops import Ops
from hvd_slowmo.outer import Momentum, momentum, next_gamma, outer_update
from hvd_slowmo.schedule import Plan, plan


class Progress(NamedTuple):
    """The scalar state of a worker. G: number of parameter groups."""

    step: Any  # int64: inner steps completed
    since: Any  # int64: own inner steps since the last average
    rates: Any  # float64 (G,): sum of the base rates over the steps of this block
    gamma: Any  # float64 (G,): mean base rate of the block before; 0 while there is none


class Store(Protocol):
    """The adapter's vectors. A tensor that is given or taken is 1-D, of the chunk's length and segment's type."""

    def read(self, vector: str, chunk: Chunk) -> Any:
        """A stretch of "model", "gradient", "anchor" or "v". What "model" and "gradient" give is the caller's own."""

    def write(self, vector: str, chunk: Chunk, value: Any) -> None:
        """Set that stretch; value is not kept."""

    def written(self, chunk: Chunk, anchor: Any) -> Any:
        """The anchor as the parameters' own type holds it, in the wire's type; `anchor` itself where that is exact."""

    def zeros(self, chunk: Chunk) -> Any:
        """A tensor of zeros like the chunk's."""

    def present(self) -> Any:
        """A tensor for `Comm` with a 1 for every parameter that has a gradient here, else 0."""

    def admit(self, counts: Any) -> None:
        """How many workers have a gradient for each parameter: where somebody has, those without one have zeros."""

    def finite(self) -> Any:
        """Whether every parameter is finite: a bool scalar. (Statistics and masks may hold infinities.)"""

    def reset_base(self) -> None:
        """Give the base optimizer's buffers their values from before the first step."""


class Machine:
    """One worker's state machine. All workers call the same methods in the same order."""

    def __init__(self, config: SlowMoConfig, layout: Layout, ops: Ops, store: Store, comm: Comm, name: str) -> None:
        self.config = config
        self.layout = layout
        self.name = name
        self._ops = ops
        self._store = store
        self._comm = comm

    def start(self) -> Progress:
        """Everybody gets rank 0's vectors; the first anchor is taken, before the first inner step."""
        for chunk in self.layout.chunks:
            mine = self._store.read("model", chunk) if self._comm.rank == 0 else self._store.zeros(chunk)
            handle = self._comm.start_sum(f"{self.name}.model.{chunk.index}", mine)
            self._store.write("model", chunk, self._comm.wait(handle))
        self._take_anchor()
        zeros = [0.0] * self.layout.groups
        return Progress(step=0, since=0, rates=self._ops.vector(zeros), gamma=self._ops.vector(zeros))

    def plan(self, progress: Progress) -> Plan:
        """What the coming step does."""
        return plan(self.config, progress.step)

    def tick(self, progress: Progress, rates: Any) -> Progress:
        """After a base step with these learning rates, a float64 vector with one per parameter group."""
        now = self.plan(progress)
        done = progress._replace(step=progress.step + 1, since=progress.since + 1, rates=progress.rates + rates)
        begun = self._ops.cond(now.begin, lambda: self._begin(done), lambda: done)
        return self._ops.cond(now.outer, lambda: self._outer(begun), lambda: begun)

    def average_gradients(self) -> None:
        """The gradients become the workers' mean; a worker without a gradient for a parameter counts as zeros."""
        chunks = [chunk for chunk in self.layout.chunks if chunk.rule == "slow"]
        present = self._comm.start_sum(f"{self.name}.present", self._store.present())
        handle = self._start("gradient", chunks[0], 1)
        self._store.admit(self._comm.wait(present))
        for chunk, total in self._sums(self._comm.wait(handle), "gradient", chunks, 1):
            self._store.write("gradient", chunk, total / self._comm.size)

    def average(self, progress: Progress) -> None:
        """The model becomes the workers' plain mean; the state stays as it is."""

        def finish(chunk: Chunk, mean: Any, _: Any) -> None:
            self._store.write("model", chunk, mean)

        self._meet(progress, AVERAGE, 1.0, finish)

    def _begin(self, progress: Progress) -> Progress:
        """The warm-up is over, all workers are equal: the first block begins here."""
        self._take_anchor()
        self._begin_block()
        return progress._replace(since=progress.since * 0, rates=progress.rates * 0)

    def _outer(self, progress: Progress) -> Progress:
        """Lines 6 to 8 of Algorithm 1, and line 2 of the block that follows."""

        def finish(chunk: Chunk, mean: Any, coefficients: Momentum) -> None:
            if chunk.rule == "mean" or not self.config.vectors:
                self._store.write("model", chunk, mean)
                return
            for piece in chunk.pieces:
                self._update(piece, mean[piece.start - chunk.start : piece.stop - chunk.start], coefficients)

        gamma = self._meet(progress, OUTER, progress.since / (self.config.tau or 1), finish)
        self._begin_block()
        return progress._replace(
            since=progress.since * 0,
            rates=progress.rates * 0,
            gamma=next_gamma(self._ops, gamma, progress.gamma),
        )

    def _meet(
        self, progress: Progress, purpose: int, share: Any, finish: Callable[[Chunk, Any, Momentum], None]
    ) -> Any:
        """The workers' mean of every chunk, handed to `finish`; returns the block's mean rates.

        The ledger and the first chunk travel together; nothing else starts and nothing is written before the ledger's
        verdict, so that a bad one raises on every worker with nothing left in flight.
        """
        ops, comm, chunks = self._ops, self._comm, self.layout.chunks
        row = Row(progress.step, purpose, 1, ops.where(self._store.finite(), 1.0, 0.0), share, progress.since)
        ledger = comm.start_sum(f"{self.name}.ledger", ops.rows(comm.rank, comm.size, row, progress.rates))
        handle = self._start("model", chunks[0], share)
        table = ops.table(comm.wait(ledger), comm.size)
        first = comm.wait(handle)
        found = verdict(ops, table)
        ops.refuse(found.bad, table, complaint(comm.ranks, self.name))
        ops.warn(found.odd, table, oddity(comm.ranks, self.name))
        coefficients = momentum(self.config, ops, found.gamma, progress.gamma)
        for chunk, total in self._sums(first, "model", chunks, share):
            finish(chunk, total / ops.like(found.weight, total), coefficients)
        return found.gamma

    def _start(self, vector: str, chunk: Chunk, share: Any) -> Any:
        x = self._ops.scaled(self._store.read(vector, chunk), share)
        return self._comm.start_sum(f"{self.name}.{vector}.{chunk.index}", x)

    def _sums(self, total: Any, vector: str, chunks: Sequence[Chunk], share: Any) -> Iterator[tuple[Chunk, Any]]:
        """Each chunk and its sum, the first of which is in; the next one travels while the caller works on one."""
        for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
            handle = None if following is None else self._start(vector, following, share)
            yield chunk, total
            if following is not None:
                total = self._comm.wait(handle)

    def _update(self, piece: Chunk, mean: Any, coefficients: Momentum) -> None:
        anchor = self._store.read("anchor", piece)
        v = self._store.read("v", piece) if "v" in self.config.vectors else None
        written = self._store.written(piece, anchor)
        if written is not anchor:
            # The block began at what half precision kept of the anchor. What that dropped is no progress of the block:
            # given back to the mean, it stays out of Delta = anchor - mean and so out of the momentum.
            mean = mean + (anchor - written)
        mine = Momentum(*(self._ops.like(c[piece.group], mean) for c in coefficients))
        anchor, v = outer_update(self.config, mean, anchor, v, mine)
        self._store.write("model", piece, anchor)
        self._store.write("anchor", piece, anchor)
        if v is not None:
            self._store.write("v", piece, v)

    def _take_anchor(self) -> None:
        if self.config.vectors:
            for chunk in self.layout.chunks:
                if chunk.rule == "slow":
                    self._store.write("anchor", chunk, self._store.read("model", chunk))

    def _begin_block(self) -> None:
        if self.config.buffers == "reset":
            self._store.reset_base()
