"""Workers that come and go, each with one gradient for all of its steps, and what NumPy makes of them."""

import numpy as np

LR, BETA, TAU, LENGTH, CHUNKS = 0.25, 0.5, 4, 12, 3
GRADIENTS = np.random.default_rng(0).standard_normal((4, LENGTH))  # of each worker, in every step


class Killed(Exception):
    """Ends a worker."""


class Breaking:
    """A Comm that raises in the place of a wait: the collective with this number, counted since it was armed.

    Args:
        comm: the workers.
        error: to raise.
    """

    def __init__(self, comm, error):
        self._comm, self._error, self.left = comm, error, None
        self.rank, self.size, self.ranks, self.node = comm.rank, comm.size, comm.ranks, comm.node

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def wait(self, handle):
        if self.left is not None:
            if self.left == 0:
                raise self._error("lost")
            self.left -= 1
        return self._comm.wait(handle)


def outer(anchor, v, models, weights):
    """Return anchor and v after an outer step, of SlowMo's equations (2) and (3) at alpha = 1."""
    mean = np.average(models, axis=0, weights=weights)
    v = BETA * v + (anchor - mean) / LR
    return anchor - LR * v, v
