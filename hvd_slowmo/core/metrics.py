"""What SlowMo returns to its user."""

from __future__ import annotations

import math
from typing import NamedTuple

from hvd_slowmo.core.progress import Observed


class Metrics(NamedTuple):
    """What `SlowMo.metrics` tells of an outer step; norms and products are over all parameters.

    Without the average (noaverage) they are of this worker's own Delta and v, and the divergence, which nobody
    knows, stays 0.
    """

    step: int  # inner steps completed, this outer step included
    divergence: float  # of the outer step before this one: mean over workers of |x_i - mean|^2 / |mean|^2
    delta_norm: float  # of Delta, the outer gradient; 0 for Local SGD, which has no anchor
    v_norm: float  # of the slow momentum, as it was before this step
    cosine: float  # of the angle between Delta and that momentum; 0 while there is none
    seconds_waited: float  # for collectives on this worker, since the outer step before
    bytes_sent: int  # handed to Horovod by this worker, since the outer step before


def metrics_of(seen: Observed, step: int, seconds_waited: float, bytes_sent: int) -> Metrics:
    """What an outer step has measured, in a user's terms."""
    norms = math.sqrt(seen.delta * seen.v)
    return Metrics(
        step=step,
        divergence=seen.divergence,
        delta_norm=math.sqrt(seen.delta),
        v_norm=math.sqrt(seen.v),
        cosine=seen.product / norms if norms else 0.0,
        seconds_waited=seconds_waited,
        bytes_sent=bytes_sent,
    )
