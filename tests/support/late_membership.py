"""Two survivors of three workers that were lost while exchanges are in flight, beside the oracle."""

import numpy as np

from hvd_slowmo.comm.threads import ThreadWorld
from support.membership import LENGTH, LR, TAU

BOTH = [0, 1]


def masks_of(layout):
    """Return a bool for each parameter, by fragment, as the oracle takes them."""
    masks = [np.zeros(LENGTH, bool) for _ in range(layout.fragments)]
    for chunk in layout.parameter_chunks:
        masks[chunk.fragment][chunk.start : chunk.stop] = True
    return masks


def together_again(members, oracle, steps, then=TAU + 3):
    """Bring two survivors together at this step, compare them with the oracle there and some steps later."""

    def after(comm):
        member = members[comm.rank]
        reformed = member.reform(comm)
        found = [(member.optimizer.steps, member.values, member.vector("anchor"), member.vector("v"))]
        member.train(then)
        return [*found, (member.optimizer.steps, member.values, member.vector("anchor"), member.vector("v"))], reformed

    (one, reformed), (other, _) = ThreadWorld(2).run(after)
    for place, more in enumerate((0, then)):
        oracle.train(BOTH, more)
        assert oracle.step == steps + more
        for number, found in enumerate((one, other)):
            step, x, anchor, v = found[place]
            assert step == steps + more
            np.testing.assert_allclose(anchor, oracle.anchor, atol=1e-13)
            np.testing.assert_allclose(v, LR * oracle.v, atol=1e-13)  # kept in units of the parameters
            np.testing.assert_allclose(x, oracle.x[number], atol=1e-13)
        assert all(np.array_equal(a, b) for a, b in zip(one[place][2:], other[place][2:], strict=True))
    return reformed
