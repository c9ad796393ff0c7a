"""Bytes and seconds of a worker's exchanges, and the measurements of its outer steps."""

from __future__ import annotations

from hvd_slowmo.comm.protocol import Comm, MeteredComm
from hvd_slowmo.core.parts.progress import Observed, Progress
from hvd_slowmo.core.step.metrics import Metrics, metrics_of


class WorkerMeter:
    """Counts over all workers that this one has trained with.

    Args:
        comm: the first workers.

    Attributes:
        comm: the present workers, counted.
        metrics: the measurements of the last outer step; None before the first one.
    """

    def __init__(self, comm: Comm) -> None:
        self.metrics: Metrics | None = None
        self._sent_before = 0  # bytes, to former workers
        self.comm = MeteredComm(comm)
        self._last = (0.0, 0.0, 0)  # seconds waited and exchanging, bytes sent, up to the last outer step

    def connect(self, comm: Comm) -> None:
        """Go on with other workers."""
        self._sent_before += self.comm.bytes_sent
        self.comm, self._last = MeteredComm(comm), (0.0, 0.0, self._sent_before)

    @property
    def bytes_sent(self) -> int:
        """Bytes handed over for sums and messages."""
        return self._sent_before + self.comm.bytes_sent

    def measure(self, progress: Progress) -> None:
        """Note the measurements of an outer step that has been applied."""
        totals = self.comm.seconds_waited, self.comm.seconds_exchanging, self.bytes_sent
        waited, exchanging, sent = (now - before for now, before in zip(totals, self._last, strict=True))
        self.metrics = metrics_of(
            Observed(*progress.observed.tolist()), int(progress.step), waited, exchanging, int(sent)
        )
        self._last = totals
