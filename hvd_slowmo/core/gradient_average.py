"""Averaging gradients over workers at a step: AR-SGD, and the warm-up of the others.

Chunks go in the order in which backward completes gradients, last parameters first, so that an adapter can send them
while backward still runs. Behind them goes a vector that says who trains, and who has a gradient for which parameter:
a worker in a join sends zeros and counts nothing, and a parameter without a gradient on any worker keeps none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.core.layout import Layout
from hvd_slowmo.core.ledger import own_row
from hvd_slowmo.core.ops import Ops
from hvd_slowmo.core.store import Store


class Attendance(NamedTuple):
    """Who took part in an exchange of gradients."""

    live: Any  # how many workers train
    leaving: Any  # (workers,): 1 for those that join for the last time
    source: Any  # the first worker that trains
    rates: Any  # (G,): its learning rates


class GradientMean:
    """Exchanges of gradients, one per step: `send_next` any number of times, `send_rest`, `finish`."""

    def __init__(self, layout: Layout, ops: Ops, store: Store, comm: Comm, name: str) -> None:
        self.chunks = [chunk for chunk in reversed(layout.chunks) if chunk.rule == "slow"]
        self._groups = layout.groups
        self._ops = ops
        self._store = store
        self._comm = comm
        self._name = name
        self._sent: list[Any] = []
        self._flags: Any = None

    @property
    def size(self) -> int:
        """How many workers average."""
        return self._comm.size

    @property
    def sent(self) -> int:
        """How many chunks are on their way."""
        return len(self._sent)

    def send_next(self) -> None:
        """Start the next chunk; its gradients are complete."""
        chunk = self.chunks[len(self._sent)]
        gradient = self._store.read("gradient", chunk)
        self._sent.append(self._comm.start_sum(f"{self._name}.gradient.{chunk.index}", gradient))

    def send_rest(self, live: int, leaving: int, rates: Any) -> None:
        """Start what has not been sent. Nothing waits here: other exchanges of this worker may begin before `finish`.

        Args:
            live: 1, or 0 in a join: then there are no gradients here.
            leaving: 1 if this worker joins for the last time.
            rates: float64 (G,): this worker's learning rates.
        """
        while len(self._sent) < len(self.chunks):
            self.send_next()
        row = own_row(self._ops, self._comm.rank, self._comm.size, (live, leaving, self._comm.rank), rates)
        flags = self._ops.pack([*row, self._store.present()])
        self._flags = self._comm.start_sum(f"{self._name}.present", flags)

    def finish(self) -> Attendance:
        """Set every gradient to the mean over the workers that train."""
        sent, self._sent = self._sent, []
        ops, size, width = self._ops, self._comm.size, 3 + self._groups
        everyone = ops.unpack(self._comm.wait(self._flags))
        table = ops.reshape(everyone[: size * width], (size, width))
        first = ops.row_of_most(table, 0)
        found = Attendance(ops.total(table[:, 0]), table[:, 1], ops.integer(first[2]), first[3:])
        self._store.admit(everyone[size * width :])
        count = ops.where(found.live > 0, found.live, 1.0)
        for chunk, handle in zip(self.chunks, sent, strict=True):
            total = self._comm.wait(handle)
            self._store.write("gradient", chunk, total / ops.like(count, total))
        return found
