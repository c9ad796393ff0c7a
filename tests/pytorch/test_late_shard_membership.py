"""Workers that come and go while exchanges are in flight, where each keeps its own slice of the outer state.

At 32 bits nobody has the lost worker's slice of the anchor; in few bits all have the anchor, and lose momentum alone.
"""

import logging

import numpy as np
import pytest
import torch

from hvd_slowmo.comm.threads import ThreadWorld, WorldError
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from hvd_slowmo_torch.membership import reform
from support.late_shards import CHUNK, FRAGMENTS, GRADIENTS, LENGTH, ShardOracle, compare, of_rank, together_again
from support.membership import BETA, LR, TAU, Breaking, Killed, OfPyTorch

ALL, BOTH = [0, 1, 2], [0, 1]
LOST = of_rank(2, 3)


class Member(OfPyTorch):
    """One worker.

    Args:
        comm: the workers, who have not come together yet.
        number: of the worker, whatever its rank becomes.
        settings: of SlowMo.
    """

    def __init__(self, comm, number, bits=32, **settings):
        torch.manual_seed(number)
        self.number, self.bits, self.broken = number, bits, Breaking(comm, WorldError if number < 2 else Killed)
        self.dtype = torch.float64 if bits == 32 else torch.float32

        class Short(SlowMo):
            _chunk_bytes = CHUNK * self.dtype.itemsize

        self.model = torch.nn.Linear(LENGTH, 1, bias=False, dtype=self.dtype)
        inner = torch.optim.SGD(self.model.parameters(), lr=LR)
        config = SlowMoConfig(**{"tau": TAU, "beta": BETA, "delay": 2, "bits": bits, "shard": True, **settings})
        self.optimizer = Short(inner, self.model, config, comm=self.broken)
        self.worker.elastic = self.worker.assembly.machine.meetings.tracks = True
        self.start = self.values.astype(np.float64)

    def train(self, steps):
        for _ in range(steps):
            self.model.weight.grad = torch.tensor(GRADIENTS[self.number], dtype=self.dtype)[None]
            self.optimizer.step()

    def train_until_lost(self):
        with pytest.raises((WorldError, Killed)):
            self.train(10 * TAU)

    def reform(self, comm):
        self.worker.assembly.machine.abandon()
        return reform(self.worker, comm)

    @property
    def state(self):
        """Steps, parameters, and by name what it keeps of a vector, zeros elsewhere."""
        return self.optimizer.steps, self.values, {name: self.kept(name) for name in ("anchor", "v")}

    def kept(self, name):
        slices, store = self.worker.assembly.runtime.slices, self.worker.store
        whole = np.zeros(LENGTH)
        for chunk in slices.chunks:
            if name not in store.slices:
                whole[chunk.start : chunk.stop] = store.vectors[name][0][chunk.start : chunk.stop]
                continue
            part = slices.part(chunk)
            if part is not None:
                whole[part.start : part.stop] = store.slices[name][chunk.index][: part.size]
        return whole


def lost(work, **settings):
    """Let three workers do this until each has noticed that the last one is lost; return the other two."""

    def before(comm):
        member = Member(comm, comm.rank, **settings)
        work(member)
        return member

    return ThreadWorld(3).run(before)[:2]


def new_member(**settings):
    member = Member(ThreadWorld(1).member(0), 2, **settings)
    member.worker.started = False
    return member


def oracle_of(members, workers=3):
    fragments = members[0].worker.assembly.layout.layout.fragments
    return ShardOracle(members[0].start, fragments, workers, delay=2)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_survivor_that_lacks_the_others_meeting_in_a_join_gets_its_result(bits):
    """See test_late_membership.py: the values are the same as there, and each has its slices."""

    def work(member):
        member.train(TAU + 1)
        member.broken.left = 2 if member.number == 0 else 1
        with pytest.raises((WorldError, Killed)):
            member.optimizer.join() if member.number < 2 else member.train(2 * TAU)

    members = lost(work, bits=bits)
    assert [member.optimizer.steps for member in members] == [2 * TAU, TAU + 1]
    met = members[0].values

    def after(comm):
        member = members[comm.rank]
        member.reform(comm)
        began = member.optimizer.steps, member.values
        member.optimizer.join()
        return *began, member.values

    for steps, values, joined in ThreadWorld(2).run(after):
        assert steps == 2 * TAU
        # In a lost slice of the anchor both have the mean of what they have.
        kept = ~LOST if bits == 32 else slice(None)
        np.testing.assert_array_equal(values[kept], met[kept])
        np.testing.assert_array_equal(joined, values)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("fragments", [1, FRAGMENTS])
def test_an_exchange_that_nobody_has_is_sent_again(fragments, bits, caplog):
    """A block is behind them. Where the anchor is lost, the outer step is a plain mean of what is in flight."""
    first = TAU + TAU // fragments

    def work(member):
        member.train(first)
        member.broken.left = 0
        member.train_until_lost()

    members = lost(work, fragments=fragments, bits=bits)
    oracle = oracle_of(members)
    oracle.train(ALL, first)
    oracle.inner(BOTH)
    oracle.inner(BOTH)
    oracle.step += 2
    oracle.lose(LOST, BOTH, anchor=bits == 32)
    oracle.events(BOTH)
    with caplog.at_level(logging.WARNING, "hvd_slowmo"):
        reformed = together_again(members, oracle)
    assert "33 % of the parameters" in caplog.text
    assert (reformed.newcomers, reformed.behind) == ((), ())


def half_landed(bits=32):
    """Return two survivors of which one has applied an exchange, and the oracle before the next one is applied.

    The other one has made a block of steps more.
    """

    def work(member):
        member.train(TAU + 1)
        member.broken.left = 1 if member.number == 0 else 0
        member.train_until_lost()

    members = lost(work, bits=bits)
    assert [member.optimizer.steps for member in members] == [2 * TAU + 1, TAU + 1]  # and one more made, on both
    oracle = oracle_of(members)
    oracle.train(ALL, TAU + 1)
    oracle.inner(BOTH)
    oracle.step += 1
    oracle.land(0, BOTH, senders=ALL)
    for _ in range(TAU - 2):
        oracle.inner([0])
    oracle.step = 2 * TAU
    oracle.launch(0, [0])
    oracle.lose(LOST, [0], lacks=[1], anchor=bits == 32)
    oracle.launch(0, [1])  # with the two steps that it has
    oracle.inner([0])
    oracle.inner([0])
    oracle.step += 2
    return members, oracle


@pytest.mark.parametrize("bits", [32, 8])
def test_an_exchange_that_one_survivor_has_applied_is_applied_by_the_other_too(bits):
    """Its own slice of the result has gone to the other one. Of the lost slice it takes the other one's values."""
    members, oracle = half_landed(bits)
    oracle.land(0, BOTH)
    reformed = together_again(members, oracle)
    assert (reformed.leader, reformed.behind) == (0, ())


# A chunk waits for the sums of the anchor, of the mean where it is lost, and of v; there are two chunks.
@pytest.mark.parametrize("waits", [(0, 0), (2, 2), (5, 5), (6, 5), (5, 6)])
def test_a_second_loss_while_slices_are_dealt(waits):
    """Nothing is applied before all is there, and nothing is lost.

    But if one survivor has its new slices and another one has not, the other's part of the former's old slice is lost.
    """
    members, oracle = half_landed()
    values = [member.values for member in members]

    def broken_off(comm):
        broken = Breaking(comm, WorldError)
        broken.left = waits[comm.rank]
        with pytest.raises(WorldError):
            members[comm.rank].reform(broken)

    ThreadWorld(2).run(broken_off)
    assert np.array_equal(members[0].values, values[0])
    assert np.array_equal(members[1].values, values[1]) == (waits[1] < 6)
    if waits == (5, 6):
        oracle.lose(of_rank(1, 3) & of_rank(0, 2), BOTH)
    oracle.land(0, BOTH)
    together_again(members, oracle)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_newcomer_gets_slices_and_has_no_part_in_what_is_in_flight(bits):
    """It starts at the anchor, is in the same exchanges from now on, and weighs its own steps in its first one."""
    steps = 2 * TAU + 1
    pair = ThreadWorld(2).run(lambda comm: (member := Member(comm, comm.rank, bits)).train(steps) or member)
    oracle = oracle_of(pair)
    oracle.train(BOTH, steps)
    oracle.x[2] = oracle.anchor.copy()
    oracle.sent[0][1][2] = oracle.anchor.copy(), 0

    def after(comm):
        member = pair[comm.rank] if comm.rank < 2 else new_member(bits=bits)
        reformed = member.reform(comm)
        first = member.state
        member.train(TAU + 3)
        return first, member.state, reformed.newcomers

    found = ThreadWorld(3).run(after)
    compare([each[0] for each in found], oracle, bits, ALL)
    oracle.train(ALL, TAU + 3)
    compare([each[1] for each in found], oracle, bits, ALL)
    assert found[0][2] == (2,)


def test_a_worker_in_its_join_has_applied_what_the_others_still_have_in_flight():
    def work(member):
        member.train(TAU + 1)
        member.broken.left = 1 if member.number == 1 else 0
        with pytest.raises((WorldError, Killed)):
            member.optimizer.join() if member.number == 1 else member.train(1)

    members = lost(work)
    oracle = oracle_of(members)
    oracle.train(ALL, TAU + 1)
    oracle.land(0, BOTH, senders=ALL)
    oracle.inner([0])
    oracle.step += 1
    oracle.lose(LOST, [1], lacks=[0])
    together_again(members, oracle)


def test_what_is_in_flight_on_all_is_not_taken_for_applied():
    """Two exchanges are in flight where one survivor applies the first; what all have made of the second is void."""

    def work(member):
        member.train(TAU)
        member.broken.left = 1 if member.number == 0 else 0
        member.train_until_lost()

    members = lost(work, fragments=FRAGMENTS, delay=3)
    assert [member.optimizer.steps for member in members] == [TAU + 2, TAU]
    oracle = ShardOracle(members[0].start, FRAGMENTS, 3, delay=3)
    oracle.train(ALL, TAU)
    oracle.inner(BOTH)
    oracle.step += 1
    oracle.land(0, BOTH, senders=ALL)
    oracle.inner([0])
    oracle.step += 1
    oracle.launch(0, [0])
    oracle.lose(LOST, [0], lacks=[1])
    oracle.launch(0, [1])
    oracle.inner([0])
    oracle.step += 1
    del oracle.sent[1][1][2]
    oracle.land(1, BOTH)
    together_again(members, oracle)


@pytest.mark.parametrize("one_has_it", [False, True])
def test_with_averaged_gradients_all_take_the_leaders_state_in_flight(one_has_it):
    """All workers are equal after each step, and so is what they have sent: its mean replaces the lost anchor."""
    mean = GRADIENTS.mean(axis=0)

    def work(member):
        member.train(TAU + 1)
        waits = FRAGMENTS + 1  # for the gradients of the step in which the exchange is applied
        member.broken.left = waits + (one_has_it and member.number == 0)
        member.train_until_lost()

    members = lost(work, gradients="all")

    def after(comm):
        member = members[comm.rank] if comm.rank < 2 else new_member(gradients="all")
        member.reform(comm)
        first = member.state
        member.train(TAU)
        return first, member.state

    found = ThreadWorld(3).run(after)
    start, gone = members[0].start, LOST
    anchor, v = start - LR * TAU * mean, LR * TAU * mean
    v = np.where(gone, 0, v)
    x = anchor - LR * 2 * mean
    anchor = np.where(gone & one_has_it, x, anchor)
    for steps, values, _ in (each[0] for each in found):
        assert steps == TAU + 2
        np.testing.assert_allclose(values, x, atol=1e-12)
    for name, expected in (("anchor", anchor), ("v", v)):
        np.testing.assert_allclose(sum(first[2][name] for first, _ in found), expected, atol=1e-12)
    second = x - LR * 2 * mean
    v = BETA * v + anchor - second
    anchor = anchor - v
    for steps, values, _ in (each[1] for each in found):
        assert steps == 2 * TAU + 2
        np.testing.assert_allclose(values, anchor - LR * 2 * mean, atol=1e-12)
    for name, expected in (("anchor", anchor), ("v", v)):
        np.testing.assert_allclose(sum(last[2][name] for _, last in found), expected, atol=1e-12)
