"""The shares of a gossip graph between many workers: few of the m x m are not 0."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

_FEW = 4
"""Messages per worker up to which picking them takes less time than a product with a sparse matrix."""


class _Pick(NamedTuple):
    """One message for each worker: the row of its sender, and the share. 0 where it gets none."""

    senders: torch.Tensor
    shares: torch.Tensor


class Shares:
    """The shares that workers send to each other at one step.

    In the place of the matrix: a dense product with the weights occupies the threads of NumPy's BLAS, which then wait
    busily for the next one while PyTorch's threads need the cores.

    Args:
        dense: (m, m), by receiver and sender.

    Example:
        >>> shares = Shares(np.array([[0.0, 0.5], [0.25, 0.0]]))
        >>> (shares @ np.array([[1.0], [2.0]])).tolist()
        [[1.0], [0.25]]
        >>> shares.messages(torch.tensor([[4.0], [8.0]]), torch.empty(2, 1)).tolist()
        [[4.0], [1.0]]
    """

    def __init__(self, dense: NDArray[np.float64]) -> None:
        self._workers = len(dense)
        self._receivers, self._senders = np.nonzero(dense)
        self._values = dense[self._receivers, self._senders]
        most = int(np.bincount(self._receivers, minlength=1).max())
        self._picks = _picks(dense, most) if most <= _FEW else None

    def __matmul__(self, w: NDArray[np.float64]) -> NDArray[np.float64]:
        arriving = np.zeros((self._workers, 1))
        np.add.at(arriving[:, 0], self._receivers, self._values * w[self._senders, 0])
        return arriving

    def messages(self, rows: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Return the sum of the messages that each worker receives, (m, n).

        Args:
            rows: the workers' vectors, (m, n).
            memory: (m, n), which may take the result; not that of the rows.
        """
        if self._picks is None:
            at, values = np.stack([self._receivers, self._senders]), torch.from_numpy(self._values)
            square = 2 * [self._workers]
            matrix = torch.sparse_coo_tensor(torch.from_numpy(at), values, square, check_invariants=True)
            return matrix.to(rows) @ rows
        for number, pick in enumerate(self._picks):
            senders, shares = pick.senders.to(rows.device), pick.shares.to(rows)[:, None]
            if number == 0:
                torch.index_select(rows, 0, senders, out=memory).mul_(shares)
            else:
                memory.addcmul_(rows.index_select(0, senders), shares)
        return memory


def _picks(dense: NDArray[np.float64], most: int) -> list[_Pick]:
    """Take a matrix with at most so many entries per row apart."""
    left, workers, picks = dense.copy(), np.arange(len(dense)), []
    for _ in range(max(1, most)):
        senders = left.argmax(axis=1)
        shares = left[workers, senders]
        left[workers, senders] = 0
        senders[shares == 0] = workers[shares == 0]  # 0 times another worker's infinity would be NaN
        picks.append(_Pick(torch.from_numpy(senders), torch.from_numpy(shares)))
    return picks
