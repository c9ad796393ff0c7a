"""Keras workers that come and go while exchanges are in flight: as tests/pytorch/test_late_membership.py.

In a trace an exchange comes before the inner step, which is not made where the exchange is broken off: its batch is
taken once more.
"""

import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.comm.threads import ThreadWorld
from support import keras_member
from support.keras_member import Member, train_until_lost
from support.late_membership import BOTH, masks_of, together_again
from support.membership import CHUNKS, TAU, LateOracle

pytestmark = [pytest.mark.slow]
tf.config.threading.set_inter_op_parallelism_threads(16)  # see test_threads.py

ALL = [0, 1, 2]


def lost(work, **settings):
    return keras_member.lost(Member, work, delay=1, **settings)


def oracle_of(members):
    layout = members[0].optimizer.worker.step.assembly.layout.layout
    return LateOracle(members[0].start, masks_of(layout), 3, delay=1)


@pytest.mark.thorough
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("fragments", [1, 2])
def test_an_exchange_that_nobody_has_is_sent_again(fragments, traced):
    """Of the values that were set aside, by those that are left."""
    first = TAU // fragments  # launched after this step, and lost in the next one

    def work(member):
        member.broken.left = 0
        train_until_lost(member)

    members = lost(work, fragments=fragments, traced=traced)
    oracle = oracle_of(members)
    oracle.train(ALL, first)
    if not traced:
        oracle.train(BOTH, 1)
    reformed = together_again(members, oracle, oracle.step)
    assert (reformed.newcomers, reformed.behind) == ((), ())


@pytest.mark.thorough
@pytest.mark.parametrize("traced", [False, True])
def test_an_exchange_that_one_survivor_has_applied_is_applied_by_the_other_too(traced):
    """It takes anchor and momentum, keeps what it has trained since it sent, and launches what it has missed."""

    def work(member):
        member.train(TAU)
        member.broken.left = 1 + CHUNKS if member.number == 0 else CHUNKS
        train_until_lost(member)

    members = lost(work, traced=traced)
    assert [member.optimizer.steps for member in members] == [2 * TAU, TAU]  # without a trace one more is made, on both
    oracle = oracle_of(members)
    oracle.train(ALL, TAU)
    oracle.inner([0] if traced else BOTH)
    oracle.step += 1
    oracle.land(0, BOTH, senders=ALL)
    for _ in range(TAU - 1):
        oracle.inner([0])
    oracle.step = 2 * TAU
    oracle.launch(0, BOTH)  # the second worker launches late, with the steps that it has
    if not traced:
        oracle.inner([0])
        oracle.step += 1
        oracle.land(0, BOTH)
    reformed = together_again(members, oracle, oracle.step)
    assert (reformed.leader, reformed.behind) == (0, ())


@pytest.mark.thorough
@pytest.mark.parametrize("bits", [32, 8])
def test_a_newcomer_has_no_part_in_what_is_in_flight(bits):
    """It starts at the anchor, is in the same exchanges from now on, and weighs its own steps in its first one."""

    def before(comm):
        member = Member(comm.rank, comm, delay=1, bits=bits)
        member.reform(comm)
        member.train(TAU)
        return member

    pair = ThreadWorld(2).run(before)
    oracle = oracle_of(pair)
    oracle.train(BOTH, TAU)
    oracle.x[2] = oracle.anchor.copy()
    oracle.sent[0][1][2] = oracle.anchor.copy(), 0

    def after(comm):
        member = pair[comm.rank] if comm.rank < 2 else Member(2, comm, delay=1, bits=bits)
        kept = member.values
        reformed = member.reform(comm)
        assert comm.rank == 2 or np.array_equal(member.values, kept)
        began = member.values
        member.train(TAU + 2)
        return began, member.values, member.vector("anchor"), member.optimizer.steps, reformed.newcomers

    found = ThreadWorld(3).run(after)
    np.testing.assert_allclose(found[2][0], oracle.anchor, atol=1e-14)
    oracle.train(ALL, TAU + 2)
    for number, (_, x, anchor, steps, newcomers) in enumerate(found):
        np.testing.assert_allclose(x, oracle.x[number], atol=1e-13)  # one dimension travels in full in few bits too
        assert np.array_equal(anchor, found[0][2])
        assert (steps, newcomers) == (2 * TAU + 2, (2,))
