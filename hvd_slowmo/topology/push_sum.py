"""Push-sum (Kempe et al. 2003; SGP: Assran et al. 2019): the weights that undo a graph's imbalance.

Workers mix numerators x and weights w alike, and read z = x / w. The weights depend on the graph alone: each worker
computes those of all, and none is sent. Only + - * / and @ on tensors, so that NumPy, torch and TensorFlow run the same
lines, traced or not. Weights are columns, (m, 1), because `@` needs a matrix in TensorFlow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hvd_slowmo.topology.graphs import Array


class Parts(NamedTuple):
    """A topology (period, m, m) taken apart."""

    kept: Array  # (period, m, 1): the share that each worker keeps
    sent: Array  # (period, m, m): the shares that it sends, zeros on the diagonal


def parts(topology: Array) -> Parts:
    """Return the shares that the workers keep and those that they send, at each step of the period.

    Example:
        >>> parts(np.full((1, 2, 2), 0.5)).kept.tolist()
        [[[0.5], [0.5]]]
    """
    kept = np.diagonal(topology, axis1=1, axis2=2)
    return Parts(kept[:, :, np.newaxis].copy(), topology * (1 - np.eye(topology.shape[1])))


def mixed(kept: Any, sent: Any, w: Any) -> Any:
    """Return all workers' weights after a synchronous step, in which messages arrive at once.

    Args:
        kept, sent: `Parts` of this step, (m, 1) and (m, m).
        w: (m, 1), ones at the start.

    Example:
        >>> kept, sent = parts(np.array([[[0.5, 0.0], [0.5, 1.0]]]))
        >>> mixed(kept[0], sent[0], np.ones((2, 1))).tolist()
        [[0.5], [1.5]]
    """
    return kept * w + sent @ w


def mixed_late(kept: Any, sent: Any, w: Any, arriving: Any) -> tuple[Any, Any]:
    """Return all workers' weights after a step that mixes the messages of one step before (OSGP), and those in flight.

    sum(w) + sum(arriving) = m always. After an average nothing is in flight: w is 1 and arriving 0.

    Args:
        kept, sent: `Parts` of this step, (m, 1) and (m, m).
        w: (m, 1), ones at the start.
        arriving: (m, 1), by receiver, zeros at the start.

    Example:
        >>> kept, sent = parts(np.full((1, 2, 2), 0.5))
        >>> w, arriving = mixed_late(kept[0], sent[0], np.ones((2, 1)), np.zeros((2, 1)))
        >>> w.tolist(), arriving.tolist()
        ([[0.5], [0.5]], [[0.5], [0.5]])
    """
    return kept * w + arriving, sent @ w


def in_flight(kept: Any, w: Any) -> Any:
    """Return the weights that the workers have just sent, by sender: (m, 1).

    Args:
        kept: `Parts.kept` of the step.
        w: before the step.

    Example:
        >>> in_flight(np.array([[0.5]]), np.array([[3.0]])).tolist()
        [[1.5]]
    """
    return w - kept * w


def carried_share(w: Any) -> Any:
    """Return the share of x that is added to z_new after an inner step took z = x / w to z_new.

    x <- z_new + (x - x / w) = z_new + (1 - 1 / w) x, and bitwise z_new where w is 1.

    Example:
        >>> round(1.0 + carried_share(1.5) * 3.0, 12)
        2.0
    """
    return 1 - 1 / w
