"""The slow-momentum update, lines 6 to 8 of Algorithm 1 (Wang et al. 2020), as pure functions.

The paper, with u the slow momentum buffer, gamma the base rate and x_bar the workers' mean after the block:

    u'  = beta u + (x_0 - x_bar) / gamma                    line 7
    x_0' = x_0 - alpha gamma u'                             line 8

Here v = gamma u is carried, with Delta = x_0 - x_bar and r = gamma / gamma_prev:

    w    = beta r v
    v'   = w + Delta
    x_0' = x_bar + (1 - alpha) Delta - alpha w              = x_0 - alpha v'
    x_0' = x_bar + (1 - alpha) Delta - alpha beta v'        = x_0 - alpha (beta v' + Delta), Nesterov

It is the same algorithm, rearranged: nothing is divided by the current rate (a rate of 0 is no error), and at
alpha = 1, beta = 0 it gives x_bar to the bit, which x_0 - (x_0 - x_bar) does not.
Only + - x / on the tensors, so that NumPy, torch and TensorFlow run the same lines.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.ops import Ops


class Momentum(NamedTuple):
    """How one parameter group's v enters this outer step and what of it stays. Each a float64 scalar."""

    carried: Any  # w = carried * v
    keep: Any  # v' = keep * v + gain * Delta
    gain: Any


def momentum(config: SlowMoConfig, ops: Ops, gamma: Any, gamma_prev: Any) -> Momentum:
    """The coefficients for gamma, the block's mean rate, after gamma_prev, the block before (0: there is none).

    gamma and gamma_prev are scalars, or vectors with an entry per parameter group. A block whose rates were all 0
    brings no momentum in and leaves v as it was: rescaling by 0 would forget it, and by the next rate divide by 0.
    """
    if not config.scale_by_lr:
        return Momentum(config.beta + 0 * gamma, config.beta + 0 * gamma, 1 + 0 * gamma)
    first = gamma_prev == 0
    ratio = ops.where(first, 1 + 0 * gamma, gamma / ops.where(first, 1 + 0 * gamma, gamma_prev))
    idle = gamma == 0
    carried = ops.where(idle, 0 * gamma, config.beta * ratio)
    return Momentum(carried, ops.where(idle, 1 + 0 * gamma, carried), ops.where(idle, 0 * gamma, 1 + 0 * gamma))


def next_gamma(ops: Ops, gamma: Any, gamma_prev: Any) -> Any:
    """The gamma_prev of the next block: a block without a rate leaves it as it was."""
    return ops.where(gamma == 0, gamma_prev, gamma)


def outer_update(config: SlowMoConfig, mean: Any, anchor: Any, v: Any, m: Momentum) -> tuple[Any, Any]:
    """x_0' and v' from the workers' mean, the anchor x_0 and v: 1-D tensors of one type and length.

    v is None where beta is 0: then there is no momentum to keep, and v' is None.
    m's entries are scalars of the tensors' own type.
    """
    delta = anchor - mean
    if v is None:
        return mean + delta * (1 - config.alpha), None
    w = v * m.carried
    back = (w + delta) * (config.alpha * config.beta) if config.nesterov else w * config.alpha
    return mean + delta * (1 - config.alpha) - back, v * m.keep + delta * m.gain
