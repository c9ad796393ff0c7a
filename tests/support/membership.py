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

    Attributes:
        left: collectives that can still be waited for; None: all.
        begins: exchanges beside the training that can still be started; None: all.
    """

    def __init__(self, comm, error):
        self._comm, self._error, self.left, self.begins = comm, error, None, None
        self.rank, self.size, self.ranks, self.node = comm.rank, comm.size, comm.ranks, comm.node

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def start_beside(self, work):
        if self.begins is not None:
            if self.begins == 0:
                raise self._error("lost")
            self.begins -= 1
        return self._comm.start_beside(work)

    def wait(self, handle):
        if self.left is not None:
            if self.left == 0:
                raise self._error("lost")
            self.left -= 1
        return self._comm.wait(handle)


def train(model, optimizer, number, steps):
    """Let a PyTorch worker take steps, all with its gradient."""
    for _ in range(steps):
        model.weight.grad = model.weight.new_tensor(GRADIENTS[number])[None]
        optimizer.step()


def values(model):
    """Return a copy of the parameters of a PyTorch model, (LENGTH,)."""
    return model.weight.detach().numpy()[0].copy()


class OfPyTorch:
    """A worker with a `model` and an `optimizer` of PyTorch's."""

    @property
    def worker(self):
        return self.optimizer.worker

    @property
    def values(self):
        return values(self.model)


def outer(anchor, v, models, weights):
    """Return anchor and v after an outer step, of SlowMo's equations (2) and (3) at alpha = 1."""
    mean = np.average(models, axis=0, weights=weights)
    v = BETA * v + (anchor - mean) / LR
    return anchor - LR * v, v


class LateOracle:
    """Late exchanges of workers that take one gradient each, in NumPy.

    Args:
        start: (LENGTH,), the parameters of all.
        masks: by fragment, a bool for each parameter.
        workers: number of them.
        delay: steps.
        gradients: of each worker, in every step.
    """

    def __init__(self, start, masks, workers, delay, gradients=GRADIENTS):
        self.masks, self.delay, self.step, self.gradients = masks, delay, 0, gradients
        self.x = [start.copy() for _ in range(workers)]
        self.anchor, self.v = start.copy(), np.zeros(len(start))
        self.since = np.zeros((workers, len(masks)), int)
        self.sent = {}  # by fragment: step, and by worker parameters and weight

    def train(self, workers, steps):
        """Take inner steps, apply what is due, and launch what meets."""
        for _ in range(steps):
            self.inner(workers)
            self.step += 1
            self.events(workers)

    def inner(self, workers):
        for i in workers:
            self.x[i] -= LR * self.gradients[i]
            self.since[i] += 1

    def events(self, workers):
        for f in range(len(self.masks)):
            if f in self.sent and self.sent[f][0] + self.delay == self.step:
                self.land(f, workers)
        for f in range(len(self.masks)):
            if self.step % TAU == -(-(f + 1) * TAU // len(self.masks)) % TAU:
                self.launch(f, workers)

    def launch(self, f, workers):
        step, sent = self.sent.get(f, (self.step, {}))
        sent |= {i: (self.x[i][self.masks[f]].copy(), self.since[i, f]) for i in workers}
        self.sent[f] = step, sent
        self.since[workers, f] = 0

    def land(self, f, workers, senders=None):
        """Apply an exchange of the workers that have sent, or of some of them."""
        mask, (_, sent) = self.masks[f], self.sent.pop(f)
        found = [sent[i] for i in (workers if senders is None else senders)]
        anchor, v = outer(self.anchor[mask], self.v[mask], *map(list, zip(*found, strict=True)))
        self.anchor[mask], self.v[mask] = anchor, v
        for i in workers:
            self.x[i][mask] = anchor + (self.x[i][mask] - sent[i][0])
