"""The parts that every piece of the state machine works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.codec import Codec, NumpyCodec
from hvd_slowmo.core.parts.layout import Layout
from hvd_slowmo.core.parts.ops import Cell, Ops
from hvd_slowmo.core.parts.outer_update import Kernels
from hvd_slowmo.core.parts.roll_call import RollCall
from hvd_slowmo.core.parts.slices import OwnSlices
from hvd_slowmo.core.parts.store import Store


class Regrouping(NamedTuple):
    """The news that workers come or go, which one worker hears and all must act on at once.

    It rides in the rows of the exchanges that there are anyway.
    """

    heard: Cell  # 1.0: this worker has heard of it
    agreed: Cell  # True: so has a worker at the last meeting, and all know


@dataclass(frozen=True)
class Runtime:
    """One worker's settings, layout, tensors and connections; made once, when the workers have started.

    Attributes:
        comm: the workers, under the optimizer's name.
        observe: measure at every outer step; see `Observed`.
        codec: of messages in bytes: in few bits, and of slices.
        watches: some worker can tell values that come from outside; see `Condition`.
        roll: what exchanges tell about all workers.
        regrouping: the news of workers that come or go.
        writes_at_once: a mean is written once all of it is there, so that one that is broken off has changed nothing.
        stacked: each tensor has a second axis, of all workers, which are at the same step. `comm` is then that of one
            worker, whose contribution to a sum is the mean over that axis.
    """

    config: SlowMoConfig
    layout: Layout
    ops: Ops
    store: Store
    comm: ScopedComm
    kernels: Kernels = field(default_factory=Kernels)
    observe: bool = False
    watches: bool = True
    codec: Codec = field(default_factory=NumpyCodec)
    writes_at_once: bool = False
    stacked: bool = False
    roll: RollCall = field(init=False)
    regrouping: Regrouping = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "roll", RollCall(self.config, self.ops, self.comm.size))
        object.__setattr__(self, "regrouping", Regrouping(self.ops.cell(0), self.ops.cell(False)))

    def keep_news(self, former: Runtime) -> None:
        """Go on with what exchanges have told another runtime of the same workers, and what they are still to tell."""
        object.__setattr__(self, "roll", former.roll)
        object.__setattr__(self, "regrouping", former.regrouping)

    @cached_property
    def slices(self) -> OwnSlices:
        """This worker's slices."""
        return OwnSlices(self.config, self.layout, self.comm.rank, self.comm.size)
