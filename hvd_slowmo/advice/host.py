"""The processors of a worker, as far as exchanges need them."""

from __future__ import annotations

import math
from typing import NamedTuple

from hvd_slowmo.advice.link import Line

NOTHING = Line(0.0, 0.0)


class Work(NamedTuple):
    """Time of the processors' part in an exchange over the bytes of the parameters, without the transport's part.

    Attributes:
        own: in the thread that trains.
        beside: in another one, during a late exchange.
    """

    own: Line = NOTHING
    beside: Line = NOTHING

    @property
    def both(self) -> Line:
        """The sum, where one thread does both."""
        return Line(self.own.latency + self.beside.latency, self.own.per_byte + self.beside.per_byte)


class Host(NamedTuple):
    """A worker's share of its machine, while all workers are busy. Without arguments: exchanges cost no time here.

    Attributes:
        cores: processor cores per worker.
        average: copies of a plain average; those of averaged gradients and of gossip cost as much.
        slowmo: an outer step.
        late: an outer step that is late, by bits.

    Example:
        >>> Host(cores=0.5).processor(0.2), Host(cores=4).processor(0.2)
        (0.1, 0.2)
    """

    cores: float = math.inf
    average: Work = Work()
    slowmo: Work = Work()
    late: tuple[tuple[int, Work], ...] = ()

    def late_work(self, bits: int) -> Work:
        """Return the work of a late outer step in so many bits."""
        return dict(self.late).get(bits, Work())

    def processor(self, elapsed: float) -> float:
        """Return the processor seconds of a thread's work that has taken so long."""
        return elapsed * min(1.0, self.cores)

    def together(self, elapsed: float, transport: float) -> float:
        """Return the time of a thread's work while the transport needs so many processor seconds."""
        alone = max(elapsed, transport / min(1.0, self.cores))
        return max(alone, (self.processor(elapsed) + transport) / self.cores)
