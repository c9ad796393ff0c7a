"""Push-sum (Kempe et al. 2003; SGP: Assran et al. 2019): the weights that undo what a graph's imbalance does.

Workers mix numerators x and weights w alike, and read z = x / w. The weights depend on the graph alone, so each worker
computes those of all and nobody sends one. Only + - * / and @ on tensors, so that NumPy, torch and TensorFlow run the
same lines, traced or not. Weights are columns, (m, 1), because `@` needs a matrix in TensorFlow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hvd_slowmo.topology.graphs import Array


class Parts(NamedTuple):
    """A topology (period, m, m) taken apart."""

    kept: Array  # (period, m, 1): the share that a worker keeps
    sent: Array  # (period, m, m): the shares that it sends, zeros on the diagonal


def parts(topology: Array) -> Parts:
    """What the workers keep and what they send, at each step of the period."""
    kept = np.diagonal(topology, axis1=1, axis2=2)
    return Parts(kept[:, :, np.newaxis].copy(), topology * (1 - np.eye(topology.shape[1])))


def mixed(kept: Any, sent: Any, w: Any) -> Any:
    """All workers' weights after a synchronous step: what is sent arrives at once.

    Args:
        kept, sent: `Parts` of this step, (m, 1) and (m, m).
        w: (m, 1), ones at the start.
    """
    return kept * w + sent @ w


def mixed_late(kept: Any, sent: Any, w: Any, arriving: Any) -> tuple[Any, Any]:
    """All workers' weights after a step that mixes what was sent one step before (OSGP), and what is on its way then.

    sum(w) + sum(arriving) = m always. After an average nothing is on its way: w is 1 and arriving 0.

    Args:
        kept, sent: `Parts` of this step, (m, 1) and (m, m).
        w: (m, 1), ones at the start.
        arriving: (m, 1), by receiver, zeros at the start.
    """
    return kept * w + arriving, sent @ w


def in_flight(kept: Any, w: Any) -> Any:
    """What the workers have just sent, by sender: (m, 1). w: before the step; kept: of the step."""
    return w - kept * w


def debiased(x: Any, w: Any) -> Any:
    """z, at which the gradient is taken and which the model shows."""
    return x / w


def carried_over(z_new: Any, x: Any, w: Any) -> Any:
    """The numerators after a base step that took z = x / w to z_new; z_new to the bit where w is 1."""
    return z_new + (x - x / w)
