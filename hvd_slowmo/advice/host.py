"""The processors of a worker, as far as exchanges need them."""

from __future__ import annotations

import math
from typing import NamedTuple


class Work(NamedTuple):
    """Processor seconds per byte of the parameters, without those of the transport.

    Attributes:
        own: in the thread that trains.
        beside: in another one, during a late exchange.
    """

    own: float = 0.0
    beside: float = 0.0


class Host(NamedTuple):
    """A worker's share of its machine. Without arguments: exchanges cost no processor time.

    Attributes:
        cores: processor cores per worker.
        average: copies of a plain average; those of averaged gradients and of gossip cost as much.
        slowmo: an outer step.
        late: an outer step that is late, by bits.

    Example:
        >>> Host(cores=0.5).elapsed(0.1), Host(cores=4).elapsed(0.1)
        (0.2, 0.1)
    """

    cores: float = math.inf
    average: Work = Work()
    slowmo: Work = Work()
    late: tuple[tuple[int, Work], ...] = ()

    def late_work(self, bits: int) -> Work:
        """Return the work of a late outer step in so many bits."""
        return dict(self.late).get(bits, Work())

    def elapsed(self, work: float) -> float:
        """Return the time of so many processor seconds of one thread, while all workers of the machine are busy."""
        return work / min(1.0, self.cores)

    def together(self, first: float, second: float) -> float:
        """Return the time of the processor seconds of two threads that run at once."""
        return max(self.elapsed(first), self.elapsed(second), (first + second) / self.cores)
