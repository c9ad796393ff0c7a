"""Averaging gradients over workers at a step: AR-SGD, and the warm-up of the others.

Chunks go in the order in which backward completes gradients, last parameters first, so that an adapter can send them
while backward still runs. Behind them goes a vector that says who trains, and who has a gradient for which parameter:
a worker in a join sends zeros and counts nothing, and a parameter without a gradient on any worker keeps none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hvd_slowmo.comm import Comm
from hvd_slowmo.layout import Layout
from hvd_slowmo.ledger import own_row
from hvd_slowmo.machine import Store
from hvd_slowmo.ops import Ops


class Attendance(NamedTuple):
    """Who took part in an exchange of gradients."""

    live: Any  # how many workers train
    leaving: Any  # (workers,): 1 for those that join for the last time
    rates: Any  # (G,): learning rates of the first worker that trains


class GradientMean:
    """Exchanges of gradients, one per step: `send_next` for chunk after chunk, any number of times, then `finish`."""

    def __init__(self, layout: Layout, ops: Ops, store: Store, comm: Comm, name: str) -> None:
        self.chunks = [chunk for chunk in reversed(layout.chunks) if chunk.rule == "slow"]
        self._groups = layout.groups
        self._ops = ops
        self._store = store
        self._comm = comm
        self._name = name
        self._sent: list[Any] = []

    @property
    def sent(self) -> int:
        """How many chunks are on their way."""
        return len(self._sent)

    def send_next(self) -> None:
        """Start the next chunk; its gradients are complete."""
        chunk = self.chunks[len(self._sent)]
        gradient = self._store.read("gradient", chunk)
        self._sent.append(self._comm.start_sum(f"{self._name}.gradient.{chunk.index}", gradient))

    def finish(self, live: int, leaving: int, rates: Any) -> Attendance:
        """Send what is left, and set every gradient to the mean over the workers that train.

        Args:
            live: 1, or 0 in a join: then there are no gradients here.
            leaving: 1 if this worker joins for the last time.
            rates: float64 (G,): this worker's learning rates.
        """
        while len(self._sent) < len(self.chunks):
            self.send_next()
        ops, size, width = self._ops, self._comm.size, 2 + self._groups
        row = own_row(ops, self._comm.rank, size, (live, leaving), rates)
        sent = self._comm.start_sum(f"{self._name}.present", ops.pack([*row, self._store.present()]))
        everyone = ops.unpack(self._comm.wait(sent))
        table = ops.reshape(everyone[: size * width], (size, width))
        found = Attendance(ops.total(table[:, 0]), table[:, 1], ops.row_of_most(table, 0)[2:])
        self._store.admit(everyone[size * width :])
        count = ops.where(found.live > 0, found.live, 1.0)
        for chunk, handle in zip(self.chunks, self._sent, strict=True):
            total = self._comm.wait(handle)
            self._store.write("gradient", chunk, total / ops.like(count, total))
        self._sent = []
        return found
