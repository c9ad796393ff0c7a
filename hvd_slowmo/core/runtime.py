"""The parts that every piece of the state machine works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.codec import Codec, NumpyCodec
from hvd_slowmo.core.layout import Layout
from hvd_slowmo.core.ops import Ops
from hvd_slowmo.core.outer_update import Kernels
from hvd_slowmo.core.slices import OwnSlices
from hvd_slowmo.core.store import Store


@dataclass(frozen=True)
class Runtime:
    """One worker's settings, layout, tensors and connections; made once, when the workers have started.

    Attributes:
        comm: the workers, under the optimizer's name.
        observe: measure at every outer step; see `Observed`.
        codec: of few bits.
        watches: some worker can tell values that come from outside; see `Condition`.
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
    stacked: bool = False

    @cached_property
    def slices(self) -> OwnSlices:
        """This worker's slices."""
        return OwnSlices(self.config, self.layout, self.comm.rank, self.comm.size)
