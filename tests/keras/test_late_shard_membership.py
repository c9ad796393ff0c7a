"""Keras workers that come and go while exchanges are in flight, where each keeps its slice of the outer state.

As tests/pytorch/test_late_shard_membership.py; but a survivor that lacks an exchange has lost its own slice of it too.
"""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.core.parts.slices import OwnSlices
from support import keras_member
from support.keras_member import Short, train_until_lost
from support.late_shards import CHUNK, FRAGMENTS, GRADIENTS, LENGTH, ShardOracle, compare, of_rank, together_again
from support.membership import TAU

pytestmark = [pytest.mark.slow]
tf.config.threading.set_inter_op_parallelism_threads(16)  # see test_threads.py

ALL, BOTH = [0, 1, 2], [0, 1]
LOST = of_rank(2, 3)


class Member(keras_member.Member):
    """One worker.

    Args:
        rank: of the worker at first.
        comm: the workers, who have not come together yet.
        settings: of SlowMo, and `traced`.
    """

    def __init__(self, rank, comm, bits=32, **settings):
        super().__init__(rank, comm, bits=bits, **{"delay": 1, "shard": True, **settings})
        self.bits, self.dtype = bits, "float64" if bits == 32 else "float32"
        values = np.random.default_rng(rank).standard_normal((LENGTH, 1))
        self.weight = keras.Variable(values, dtype=self.dtype)
        self.start = self.values.astype(np.float64)

    def train(self, steps):
        gradient = tf.constant(GRADIENTS[self.number][:, None], self.dtype)
        for _ in range(steps):
            self._step(gradient)

    @property
    def values(self):
        return self.weight.numpy().ravel().copy()

    @property
    def state(self):
        """Steps, parameters, and by name what it keeps of a vector, zeros elsewhere."""
        return self.optimizer.steps, self.values, {name: self.kept(name) for name in ("anchor", "v")}

    def kept(self, name):
        variables, layout = self.optimizer.worker.variables, self.optimizer.worker.step.assembly.layout.layout
        slices = OwnSlices(self.optimizer.config, layout, *variables.owner)
        whole = np.zeros(LENGTH)
        for chunk in slices.chunks:
            if name not in variables.slices:
                whole[chunk.start : chunk.stop] = variables.vectors[name][chunk.index].numpy()
                continue
            part = slices.part(chunk)
            whole[part.start : part.stop] = variables.slices[name][chunk.index].numpy()[: part.size]
        return whole


@pytest.fixture(autouse=True)
def _chunks(monkeypatch, request):
    few = "bits" in request.fixturenames and request.getfixturevalue("bits") < 32
    monkeypatch.setattr(Short, "_chunk_bytes", CHUNK * (4 if few else 8))


def lost(work, **settings):
    return keras_member.lost(Member, work, **settings)


def oracle_of(members):
    fragments = members[0].optimizer.worker.step.assembly.layout.layout.fragments
    return ShardOracle(members[0].start, fragments, 3, delay=1)


@pytest.mark.thorough
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("fragments", "bits"), [(1, 32), (FRAGMENTS, 32), (FRAGMENTS, 8)])
def test_an_exchange_that_nobody_has_is_sent_again(fragments, bits, traced, caplog):
    """A block is behind them. Where the anchor is lost, the outer step is a plain mean of what is in flight."""
    first = TAU + TAU // fragments

    def work(member):
        member.train(first)
        member.broken.left = 0
        train_until_lost(member)

    members = lost(work, fragments=fragments, bits=bits, traced=traced)
    oracle = oracle_of(members)
    oracle.train(ALL, first)
    for sent in oracle.sent.values():
        del sent[1][2]
    if not traced:
        oracle.inner(BOTH)
        oracle.step += 1
    oracle.lose(LOST, BOTH, anchor=bits == 32)
    if not traced:
        oracle.events(BOTH)
    with caplog.at_level(logging.WARNING, "hvd_slowmo"):
        reformed = together_again(members, oracle)
    assert "33 % of the parameters" in caplog.text
    assert (reformed.newcomers, reformed.behind) == ((), ())


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.thorough
def test_an_exchange_that_one_survivor_has_applied_is_applied_by_the_other_too(bits, traced):
    """Both its own slice and that of the lost worker are gone: there it takes the other one's values."""
    waits = 1 + 2 * FRAGMENTS  # the ledger, and each chunk in two phases

    def work(member):
        member.train(TAU)
        member.broken.left = waits if member.number == 0 else waits - 1
        train_until_lost(member)

    members = lost(work, bits=bits, traced=traced)
    assert [member.optimizer.steps for member in members] == [2 * TAU, TAU]  # without a trace one more is made, on both
    oracle = oracle_of(members)
    oracle.train(ALL, TAU)
    oracle.inner([0] if traced else BOTH)
    oracle.step += 1
    oracle.land(0, BOTH, senders=ALL)
    for _ in range(TAU - 1):
        oracle.inner([0])
    oracle.step = 2 * TAU
    oracle.launch(0, [0])
    oracle.lose(LOST | of_rank(1, 3), [0], lacks=[1], anchor=bits == 32)
    oracle.launch(0, [1])
    if not traced:
        oracle.inner([0])
        oracle.step += 1
        oracle.land(0, BOTH)
    reformed = together_again(members, oracle)
    assert (reformed.leader, reformed.behind) == (0, ())


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.thorough
def test_a_newcomer_gets_slices_and_has_no_part_in_what_is_in_flight(bits):
    """It starts at the anchor, is in the same exchanges from now on, and weighs its own steps in its first one."""

    def before(comm):
        member = Member(comm.rank, comm, bits=bits)
        member.reform(comm)
        member.train(2 * TAU)
        return member

    pair = ThreadWorld(2).run(before)
    oracle = oracle_of(pair)
    oracle.train(BOTH, 2 * TAU)
    oracle.x[2] = oracle.anchor.copy()
    oracle.sent[0][1][2] = oracle.anchor.copy(), 0

    def after(comm):
        member = pair[comm.rank] if comm.rank < 2 else Member(2, comm, bits=bits)
        reformed = member.reform(comm)
        first = member.state
        member.train(TAU + 2)
        return first, member.state, reformed.newcomers

    found = ThreadWorld(3).run(after)
    compare([each[0] for each in found], oracle, bits, ALL)
    oracle.train(ALL, TAU + 2)
    compare([each[1] for each in found], oracle, bits, ALL)
    assert found[0][2] == (2,)
