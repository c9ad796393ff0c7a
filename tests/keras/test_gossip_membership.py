"""Gossiping Keras workers that come and go: as tests/pytorch/test_gossip_membership.py."""

import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.comm.threads import ThreadWorld, WorldError
from reference.gossip import run_gossip
from support.gossip_membership import METHODS, PAIR
from support.keras_member import Member
from support.membership import BETA, CHUNKS, GRADIENTS, LENGTH, LR, TAU, Breaking, Killed

pytestmark = [pytest.mark.slow]
tf.config.threading.set_inter_op_parallelism_threads(16)  # see test_threads.py


def lost(steps, messages, **settings):
    """Let three workers make these steps, and lose the last one once so many messages of the next have come."""

    def before(comm):
        broken = Breaking(comm, WorldError if comm.rank < 2 else Killed)
        member = Member(comm.rank, broken, **settings)
        member.reform(broken)
        member.train(steps)
        broken.left = messages[comm.rank]
        with pytest.raises(tf.errors.OpError):
            member.train(3)
        return member

    return ThreadWorld(3).run(before)[:2]


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:tau=None")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("messages", [(0, 0, 0), (CHUNKS, CHUNKS - 1, CHUNKS - 1)], ids=["none", "part of them"])
@pytest.mark.parametrize("traced", [False, True], ids=["untraced", "traced"])
def test_the_mean_of_the_survivors_models_clears_weights_and_messages(traced, messages, method):
    pair = lost(4, messages, tau=None, beta=0.0, gossip=METHODS[method], traced=traced)
    mean = np.mean([member.values for member in pair], axis=0)

    def after(comm):
        member = pair[comm.rank]
        member.reform(comm)
        began = member.values, member.optimizer.steps
        member.train(5)
        return *began, member.values, member.optimizer.steps

    found = ThreadWorld(2).run(after)
    steps = found[0][1]
    assert steps in (4, 5, 6)
    for began, count, _, last in found:
        np.testing.assert_allclose(began, mean, atol=1e-13)
        assert (count, last) == (steps, steps + 5)
    # The step that was broken off is completed, by a mixing of equal parameters, if it was made.
    made = int(not (traced and method == "osgp"))
    reference = run_gossip(
        mean, lambda i, batch, z: GRADIENTS[i] * (batch >= made), topology=PAIR, lr=LR, steps=made + 5, tau=None,
        overlap=method == "osgp", gossip="dpsgd" if method == "dpsgd" else "sgp",
    )  # fmt: skip
    for number, (_, _, x, _) in enumerate(found):
        np.testing.assert_allclose(x, reference[-1].z[number], atol=1e-13)
    np.testing.assert_allclose(pair[0].optimizer.worker.variables.now.mixing.weights, reference[-1].w, atol=1e-14)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["sgp", "osgp"])
def test_an_outer_step_with_a_loss_and_a_newcomer(method):
    """The survivors' mean counts, and the newcomer begins there; its slots of weights and messages are new."""
    settings = {"gossip": METHODS[method], "tau": TAU}
    pair = lost(TAU + 1, (0, 0, 0), **settings)
    anchor, v = pair[0].vector("anchor"), pair[0].vector("v")
    mean = np.mean([member.values for member in pair], axis=0)

    def after(comm):
        member = pair[comm.rank] if comm.rank < 2 else Member(2, comm, **settings)
        reformed = member.reform(comm)
        began, steps = member.values, member.optimizer.steps
        member.train(2 * TAU - steps)
        return began, steps, member.values, member.vector("v"), reformed.newcomers

    found = ThreadWorld(3).run(after)
    steps = found[0][1]
    v = BETA * v + anchor - (mean - LR * (2 * TAU - steps) * GRADIENTS[:3].mean(axis=0))
    for began, count, last, own_v, newcomers in found:
        np.testing.assert_allclose(began, mean, atol=1e-13)
        assert (count, newcomers) == (steps, (2,))
        np.testing.assert_allclose(last, anchor - v, atol=1e-13)
        np.testing.assert_allclose(own_v, v, atol=1e-13)
        assert np.array_equal(last, found[0][2])
        assert last.shape == (LENGTH,)
