"""Late exchanges of workers that keep slices of the outer state, beside the oracle.

A chunk has six blocks, and there is one for each of two fragments.
Two workers survive of three, and rank 2 is lost, which has kept the last third of each chunk.
"""

import numpy as np

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.core.parts.layout import BLOCK
from support.membership import LR, TAU, LateOracle

CHUNK, FRAGMENTS = 6 * BLOCK, 2
LENGTH = CHUNK * FRAGMENTS
GRADIENTS = np.random.default_rng(5).standard_normal((3, LENGTH))


def of_rank(rank, workers):
    """Return where a worker keeps its slices."""
    place = np.arange(LENGTH) % CHUNK
    return (rank * CHUNK // workers <= place) & (place < (rank + 1) * CHUNK // workers)


class ShardOracle(LateOracle):
    """The same with slices that are lost.

    Args:
        start: (LENGTH,), the parameters of all.
        fragments: number of them.
        workers: number of them.
        delay: steps.
    """

    def __init__(self, start, fragments, workers, delay):
        chunk = np.arange(LENGTH) // CHUNK
        masks = [chunk == f for f in range(fragments)] if fragments > 1 else [np.ones(LENGTH, bool)]
        super().__init__(start, masks, workers, delay, GRADIENTS)

    def lose(self, lost, has, lacks=(), anchor=True):
        """Forget momentum, and the anchor if that is kept in slices.

        Args:
            lost: a bool for each parameter.
            has: workers that have applied all exchanges.
            lacks: others, who have not applied one of fragment 0; they have caught up already.
        """
        self.v[lost] = 0
        for f, mask in enumerate(self.masks) if anchor else ():
            gone, sent = mask & lost, self.sent.get(f, (0, {}))[1]
            those = has if f == 0 else [*has, *lacks]
            models = [sent[i][0][gone[mask]] if i in sent else self.x[i][gone] for i in those]
            weights = [sent[i][1] if i in sent else self.since[i, f] for i in those]
            self.anchor[gone] = np.average(models, axis=0, weights=weights if any(weights) else None)
            for i in lacks if f == 0 else ():
                self.x[i][gone] = self.anchor[gone]


def compare(found, oracle, bits, workers=(0, 1)):
    """Compare the survivors' state with the oracle's.

    Args:
        found: of each worker: steps, parameters, and by name what it keeps, zeros elsewhere.
        bits: fewer than 32 are compared up to rounding.
    """
    near = {"atol": 1e-11} if bits == 32 else {"atol": 0.06, "rtol": 0}
    for number, (steps, x, vectors) in zip(workers, found, strict=True):
        assert steps == oracle.step
        np.testing.assert_allclose(x, oracle.x[number], **near)
        if bits < 32:
            np.testing.assert_allclose(vectors["anchor"], oracle.anchor, **near)
            assert np.array_equal(vectors["anchor"], found[0][2]["anchor"])
    np.testing.assert_allclose(sum(vectors["v"] for *_, vectors in found), LR * oracle.v, **near)
    if bits == 32:
        np.testing.assert_allclose(sum(vectors["anchor"] for *_, vectors in found), oracle.anchor, **near)


def together_again(members, oracle, then=TAU + 3):
    """Bring the survivors together, and compare them with the oracle there and some steps later."""

    def after(comm):
        member = members[comm.rank]
        reformed = member.reform(comm)
        first = member.state
        member.train(then)
        return first, member.state, reformed

    found = ThreadWorld(len(members)).run(after)
    compare([each[0] for each in found], oracle, members[0].bits)
    oracle.train(list(range(len(members))), then)
    compare([each[1] for each in found], oracle, members[0].bits)
    return found[0][2]
