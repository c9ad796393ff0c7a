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
alpha = 1, beta = 0 the result is bitwise identical to x_bar, while x_0 - (x_0 - x_bar) is not.
Only + - x / on the tensors, so that NumPy, torch and TensorFlow run the same lines.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.ops import Ops
from hvd_slowmo.core.parts.progress import Scalar, Vector


class Momentum(NamedTuple):
    """Coefficients of one parameter group's v in an outer step. Each a float64 scalar, or a vector over the groups."""

    carried: Scalar  # w = carried * v
    keep: Scalar  # v' = keep * v + gain * Delta
    gain: Scalar


def momentum(config: SlowMoConfig, ops: Ops, gamma: Vector, gamma_prev: Vector) -> Momentum:
    """Return the coefficients for gamma, the block's mean rate, after gamma_prev, the block before (0: there is none).

    gamma and gamma_prev are scalars, or vectors with an entry per parameter group. A block whose rates were all 0
    brings no momentum in and leaves v as it was: rescaling by 0 would forget it, and by the next rate divide by 0.
    """
    if not config.scale_by_lr:
        return Momentum(config.beta + 0 * gamma, config.beta + 0 * gamma, 1 + 0 * gamma)
    first = gamma_prev == 0
    ratio = ops.where(first, 1 + 0 * gamma, gamma / ops.where(first, 1 + 0 * gamma, gamma_prev))
    still = gamma == 0
    carried = ops.where(still, 0 * gamma, config.beta * ratio)
    return Momentum(carried, ops.where(still, 1 + 0 * gamma, carried), ops.where(still, 0 * gamma, 1 + 0 * gamma))


def next_gamma(ops: Ops, gamma: Vector, gamma_prev: Vector) -> Vector:
    """Return the gamma_prev of the next block: a block without a rate leaves it as it was."""
    return ops.where(gamma == 0, gamma_prev, gamma)


def outer_update(config: SlowMoConfig, mean: Any, anchor: Any, v: Any, m: Momentum) -> tuple[Any, Any]:
    """Return x_0' and v' from the workers' mean, the anchor x_0 and v: 1-D tensors of one type and length.

    v is None where beta is 0: then there is no momentum to keep, and v' is None.
    m's entries are scalars of the tensors' own type.

    Example:
        >>> import numpy as np
        >>> m = Momentum(carried=0.5, keep=0.5, gain=1.0)
        >>> x, v = outer_update(SlowMoConfig(beta=0.5), np.array([1.0]), np.array([2.0]), np.array([4.0]), m)
        >>> x.tolist(), v.tolist()
        ([-1.0], [3.0])
    """
    if v is None and config.alpha == 1:
        return mean, None
    delta = anchor - mean
    base = mean if config.alpha == 1 else mean + delta * (1 - config.alpha)
    if v is None:
        return base, None
    w = v * m.carried
    back = (w + delta) * (config.alpha * config.beta) if config.nesterov else w * config.alpha
    return base - back, v * m.keep + delta * m.gain


def scaled_sum(x: Any, factor: Any, y: Any, memory: Callable[[], Any]) -> Any:
    """Return x * factor + y.

    Args:
        memory: returns a tensor that may take the result, x or y among others. Where results are new, as here, it is
            not called: in a trace it would read a variable.

    Example:
        >>> scaled_sum(3.0, 0.5, 1.0, memory=lambda: None)
        2.5
    """
    return x * factor + y


class Kernels(NamedTuple):
    """Elementwise work of an exchange, in the forms that suit a framework.

    Attributes:
        outer_update: as the function of that name.
        divide: a sum by a scalar; the sum is not needed any more.
        scaled_sum: as the function of that name.
        tile: elements that are updated at once, so that a processor's cache holds the temporaries; None: a whole chunk.
    """

    outer_update: Callable[..., tuple[Any, Any]] = outer_update
    divide: Callable[[Any, Any], Any] = operator.truediv
    scaled_sum: Callable[[Any, Any, Any, Callable[[], Any]], Any] = scaled_sum
    tile: int | None = None
