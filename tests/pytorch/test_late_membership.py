"""Workers that come and go while exchanges are in flight: each is applied once, and survivors keep all that they have.

One gradient per worker and step, and the oracle is NumPy's. Numbers of workers: 0 and 1 survive, 2 is lost or new.
"""

import numpy as np
import pytest
import torch

from hvd_slowmo.comm.threads import ThreadWorld, WorldError
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from hvd_slowmo_torch.membership import reform
from reference.few_bits import mean_of_differences
from support.late_membership import BOTH, masks_of, together_again
from support.membership import BETA, CHUNKS, GRADIENTS, LENGTH, LR, TAU, Breaking, Killed, LateOracle, OfPyTorch, outer

ALL = [0, 1, 2]


class Short(SlowMo):
    _chunk_bytes = 8 * LENGTH // CHUNKS


class Member(OfPyTorch):
    """One worker.

    Args:
        comm: the workers, who have not come together yet.
        number: of the worker, whatever its rank becomes.
    """

    def __init__(self, comm, number, **settings):
        torch.manual_seed(number)
        self.number, self.broken = number, Breaking(comm, WorldError if number < 2 else Killed)
        self.model = torch.nn.Linear(LENGTH, 1, bias=False, dtype=torch.float64)
        inner = torch.optim.SGD(self.model.parameters(), lr=LR)
        config = SlowMoConfig(**{"tau": TAU, "beta": BETA, "delay": 2, **settings})
        self.optimizer = Short(inner, self.model, config, comm=self.broken)
        self.worker.elastic = self.worker.assembly.machine.meetings.tracks = True
        self.start = self.values

    @property
    def masks(self):
        return masks_of(self.worker.assembly.layout.layout)

    def vector(self, name):
        return self.worker.store.vectors[name][0].numpy().copy()

    def train(self, steps):
        for _ in range(steps):
            self.model.weight.grad = torch.tensor(GRADIENTS[self.number])[None]
            self.optimizer.step()

    def train_until_lost(self):
        with pytest.raises((WorldError, Killed)):
            self.train(10 * TAU)

    def reform(self, comm):
        self.worker.assembly.machine.abandon()
        return reform(self.worker, comm)


def lost(work, **settings):
    """Let three workers do this until each has noticed that the last one is lost; return the other two."""

    def before(comm):
        member = Member(comm, comm.rank, **settings)
        work(member)
        return member

    return ThreadWorld(3).run(before)[:2]


@pytest.mark.parametrize("fragments", [1, 2])
def test_an_exchange_that_nobody_has_is_sent_again(fragments):
    """Of the values that were set aside, by those that are left."""
    first = TAU // fragments  # launched after this step, and lost two steps later

    def work(member):
        member.broken.left = 0
        member.train_until_lost()

    members = lost(work, fragments=fragments)
    oracle = LateOracle(members[0].start, members[0].masks, 3, delay=2)
    oracle.train(ALL, first + 1)
    oracle.train(BOTH, 1)
    reformed = together_again(members, oracle, first + 2)
    assert (reformed.newcomers, reformed.behind) == ((), ())


def test_an_exchange_that_one_survivor_has_applied_is_applied_by_the_other_too():
    """It takes anchor and momentum, keeps what it has trained since it sent, and launches what it has missed."""

    def work(member):
        member.train(TAU + 1)
        member.broken.left = 1 if member.number == 0 else 0
        member.train_until_lost()

    members = lost(work)
    assert [member.optimizer.steps for member in members] == [2 * TAU + 1, TAU + 1]  # and one more made, on both
    oracle = LateOracle(members[0].start, members[0].masks, 3, delay=2)
    oracle.train(ALL, TAU + 1)
    oracle.inner(BOTH)
    oracle.step += 1
    oracle.land(0, BOTH, senders=ALL)
    for _ in range(TAU - 2):
        oracle.inner([0])
    oracle.step = 2 * TAU
    oracle.launch(0, BOTH)  # the second worker launches late, with the two steps that it has
    oracle.inner([0])
    oracle.inner([0])
    oracle.step += 2
    oracle.land(0, BOTH)
    reformed = together_again(members, oracle, 2 * TAU + 2)
    assert (reformed.leader, reformed.behind) == (0, ())


def test_a_worker_in_its_join_has_applied_what_the_others_still_have_in_flight():
    def work(member):
        member.train(TAU + 1)
        member.broken.left = 1 if member.number == 1 else 0
        with pytest.raises((WorldError, Killed)):
            member.optimizer.join() if member.number == 1 else member.train(1)

    members = lost(work)
    oracle = LateOracle(members[0].start, members[0].masks, 3, delay=2)
    oracle.train(ALL, TAU + 1)
    oracle.land(0, BOTH, senders=ALL)
    oracle.inner([0])
    oracle.step += 1
    together_again(members, oracle, TAU + 2)


def test_a_survivor_that_lacks_the_others_meeting_in_a_join_gets_its_result():
    """Workers meet there without a launch, so that the one that lacks it has nothing in flight."""

    def work(member):
        member.train(TAU + 1)
        member.broken.left = 2 if member.number == 0 else 1  # the exchange in flight; the meeting after it
        with pytest.raises((WorldError, Killed)):
            member.optimizer.join() if member.number < 2 else member.train(2 * TAU)

    members = lost(work)
    assert [member.optimizer.steps for member in members] == [2 * TAU, TAU + 1]
    oracle = LateOracle(members[0].start, members[0].masks, 3, delay=2)
    oracle.train(ALL, TAU + 1)
    oracle.land(0, ALL)
    for _ in range(TAU - 1):
        oracle.inner([2])
    oracle.step = 2 * TAU
    oracle.launch(0, ALL)
    oracle.land(0, BOTH, senders=ALL)
    reformed = together_again(members, oracle, 2 * TAU)
    assert (reformed.leader, reformed.behind) == (0, ())


def test_an_exchange_that_can_not_begin_is_in_flight_all_the_same():
    """In the same step another one has been applied, which must not be applied once more."""

    def work(member):
        member.broken.begins = 1 if member.number != 1 else None
        member.train_until_lost()

    members = lost(work, fragments=2)
    assert [member.optimizer.steps for member in members] == [TAU, TAU + 1]
    oracle = LateOracle(members[0].start, members[0].masks, 3, delay=2)
    oracle.train(ALL, TAU)
    oracle.inner([1])
    oracle.inner([1])
    oracle.step += 2
    oracle.events(BOTH)
    together_again(members, oracle, TAU + 2)


def test_a_newcomer_has_no_part_in_what_is_in_flight():
    """It starts at the anchor, is in the same exchanges from now on, and weighs its own steps in its first one."""
    pair = ThreadWorld(2).run(lambda comm: (member := Member(comm, comm.rank)).train(TAU + 1) or member)
    oracle = LateOracle(pair[0].start, pair[0].masks, 3, delay=2)
    oracle.train(BOTH, TAU + 1)
    oracle.x[2] = oracle.anchor.copy()
    oracle.sent[0][1][2] = oracle.anchor.copy(), 0

    def after(comm):
        member = pair[comm.rank] if comm.rank < 2 else new_member()
        kept = member.values
        reformed = member.reform(comm)
        assert comm.rank == 2 or np.array_equal(member.values, kept)
        began = member.values
        member.train(TAU + 3)
        return began, member.values, member.vector("anchor"), member.optimizer.steps, reformed.newcomers

    found = ThreadWorld(3).run(after)
    np.testing.assert_allclose(found[2][0], oracle.anchor, atol=1e-14)
    oracle.train(ALL, TAU + 3)
    for number, (_, x, anchor, steps, newcomers) in enumerate(found):
        np.testing.assert_allclose(x, oracle.x[number], atol=1e-13)
        assert np.array_equal(anchor, found[0][2])
        assert (steps, newcomers) == (2 * TAU + 4, (2,))


def new_member(**settings):
    member = Member(ThreadWorld(1).member(0), 2, **settings)
    member.worker.started = False
    return member


def test_an_exchange_in_which_nobody_has_a_part_is_dropped():
    """A newcomer that is the only one left: the mean of no steps would be a division by zero."""
    pair = ThreadWorld(2).run(lambda comm: (member := Member(comm, comm.rank)).train(TAU + 1) or member)

    def three(comm):
        member = pair[comm.rank] if comm.rank < 2 else new_member()
        member.reform(comm)
        return member

    newcomer = ThreadWorld(3).run(three)[2]
    start = newcomer.values

    def alone(comm):
        newcomer.reform(comm)
        newcomer.train(TAU + 1)
        return newcomer.values, newcomer.optimizer.steps

    ((found, steps),) = ThreadWorld(1).run(alone)
    anchor, _ = outer(start, np.zeros(LENGTH), [start - LR * 3 * GRADIENTS[2]], [3])
    np.testing.assert_allclose(found, anchor - LR * 2 * GRADIENTS[2], atol=1e-13)
    assert steps == 2 * TAU + 2


def test_a_second_loss_while_the_anchor_is_given_costs_nothing():
    """Whoever was given a part of it has applied nothing: it takes all of it from a worker that has it."""

    def work(member):
        member.train(TAU + 1)
        member.broken.left = 1 if member.number == 0 else 0
        member.train_until_lost()

    members = lost(work)
    oracle = LateOracle(members[0].start, members[0].masks, 3, delay=2)
    oracle.train(ALL, TAU + 1)
    oracle.inner(BOTH)
    oracle.step += 1
    oracle.land(0, BOTH, senders=ALL)
    for _ in range(TAU - 2):
        oracle.inner([0])
    oracle.step = 2 * TAU

    def broken_off(comm):
        broken = Breaking(comm, WorldError)
        broken.left = 2 * CHUNKS - 1  # one chunk of v is missing
        with pytest.raises(WorldError):
            members[comm.rank].reform(broken)

    broken_off_values = members[1].values
    ThreadWorld(2).run(broken_off)
    assert np.array_equal(members[1].values, broken_off_values)
    oracle.launch(0, BOTH)
    oracle.inner([0])
    oracle.inner([0])
    oracle.step += 2
    oracle.land(0, BOTH)
    reformed = together_again(members, oracle, 2 * TAU + 2)
    assert reformed.behind == ()


@pytest.mark.parametrize("one_has_it", [False, True])
def test_in_few_bits_what_was_set_aside_is_rounded_again(one_has_it):
    length, gradients = 1500, np.random.default_rng(1).standard_normal((3, 1500)).astype(np.float32)

    def before(comm):
        torch.manual_seed(0)
        broken = Breaking(comm, WorldError if comm.rank < 2 else Killed)
        model = torch.nn.Linear(length, 1, bias=False)
        config = SlowMoConfig(tau=2, beta=BETA, delay=1, bits=8)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=LR), model, config, comm=broken)
        optimizer.worker.elastic = optimizer.worker.assembly.machine.meetings.tracks = True
        start = model.weight.detach().numpy()[0].copy()
        broken.left = 1 if one_has_it and comm.rank == 0 else 0
        with pytest.raises((WorldError, Killed)):
            train(comm.rank, model, optimizer)
        return model, optimizer, start

    def train(number, model, optimizer):
        for _ in range(20):
            model.weight.grad = torch.tensor(gradients[number])[None]
            optimizer.step()

    everyone = ThreadWorld(3).run(before)

    def after(comm):
        model, optimizer, _ = everyone[comm.rank]
        optimizer.worker.assembly.machine.abandon()
        reform(optimizer.worker, comm)
        store = optimizer.worker.store
        found = [store.vectors[name][0].numpy().copy() for name in ("anchor", "v", "residual")]
        return optimizer.steps, model.weight.detach().numpy()[0].copy(), *found

    found = ThreadWorld(2).run(after)
    start = everyone[0][2]
    sent = [start - LR * g - LR * g for g in gradients]
    owed, nothing = [np.zeros_like(start)] * 3, np.zeros(1024, np.float32)
    rests = [nothing, nothing]
    if one_has_it:
        delta, owed, rests = mean_of_differences(start, sent, owed, [nothing[:0], nothing, nothing], [1.0] * 3, 8)
        anchor, v = start - delta, delta
        owed[1] *= 0  # dropped where the anchor was given by another
        rests = [rests[1], nothing]  # worker 1 had the first block and worker 2 the second: they are dealt anew
        again = [anchor - LR * gradients[0] - LR * gradients[0], anchor - LR * gradients[1]]
        weights, steps = [1.0, 0.5], 5
    else:
        anchor, v, again, weights, steps = start, 0 * start, sent[:2], [1.0, 1.0], 3
    delta, owed, _ = mean_of_differences(anchor, again, owed[:2], rests, weights, 8)
    v = np.float32(BETA) * v + delta
    anchor = anchor - v
    for number, (count, x, own_anchor, own_v, residual) in enumerate(found):
        assert count == steps
        np.testing.assert_allclose(own_anchor, anchor, atol=1e-5)
        np.testing.assert_allclose(own_v, v, atol=1e-5)
        np.testing.assert_allclose(residual, owed[number], atol=1e-5)
        trained = LR * gradients[number] if number == 0 or not one_has_it else 0
        np.testing.assert_allclose(x, anchor - trained, atol=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(found[0][2:4], found[1][2:4], strict=True))


@pytest.mark.parametrize("one_has_it", [False, True])
def test_with_averaged_gradients_all_take_the_leaders_state_in_flight(one_has_it):
    """All workers are equal after each step, and so is what they have sent."""
    mean = GRADIENTS[:3].mean(axis=0)

    def work(member):
        member.train(TAU + 1)
        waits = CHUNKS + 1  # for the gradients of the step in which the exchange is applied
        member.broken.left = waits + (one_has_it and member.number == 0)
        member.train_until_lost()

    members = lost(work, gradients="all")

    def after(comm):
        member = members[comm.rank] if comm.rank < 2 else new_member(gradients="all")
        member.reform(comm)
        steps, values = member.optimizer.steps, member.values
        member.train(TAU)
        return steps, values, member.values, member.vector("anchor"), member.vector("v")

    found = ThreadWorld(3).run(after)
    start = members[0].start
    anchor, v = outer(start, np.zeros(LENGTH), [start - LR * TAU * mean], [1])
    for steps, values, *_ in found:
        assert steps == TAU + 2
        np.testing.assert_allclose(values, anchor - LR * 2 * mean, atol=1e-13)
    second = anchor - LR * 2 * mean - LR * 2 * mean
    expected, v = outer(anchor, v, [second], [1])
    for _, _, last, own_anchor, own_v in found:
        np.testing.assert_allclose(last, expected - LR * 2 * mean, atol=1e-13)
        np.testing.assert_allclose(own_anchor, expected, atol=1e-13)
        np.testing.assert_allclose(own_v, LR * v, atol=1e-13)
        assert np.array_equal(last, found[0][2])


def test_without_an_anchor_a_survivor_that_has_missed_an_exchange_starts_where_the_other_is():
    """Local SGD keeps no mean that could be given to it."""

    def work(member):
        member.train(TAU + 1)
        member.broken.left = 1 if member.number == 0 else 0
        member.train_until_lost()

    members = lost(work, beta=0.0)

    def after(comm):
        member = members[comm.rank]
        before = member.values
        reformed = member.reform(comm)
        return before, member.values, member.optimizer.steps, reformed.behind

    (leader, one, steps, behind), (_, other, other_steps, _) = ThreadWorld(2).run(after)
    mean = members[0].start - LR * TAU * GRADIENTS[:3].mean(axis=0)
    sent = mean - LR * TAU * GRADIENTS[0]
    np.testing.assert_allclose(leader, sent - LR * 2 * GRADIENTS[0], atol=1e-13)
    np.testing.assert_allclose(one, leader, atol=1e-13)  # the exchange in flight was the leader's own, applied by now
    np.testing.assert_allclose(other, sent, atol=1e-13)  # whose result is the mean, and has nothing to add
    assert (steps, other_steps, behind) == (2 * TAU + 2, 2 * TAU + 2, (1,))


@pytest.mark.parametrize("settings", [{"fragments": 1}, {"tau": 8}])
def test_a_newcomer_with_other_settings_is_an_error_on_all(settings):
    """Before anybody compares places, which mean something under equal settings alone."""
    survivor = ThreadWorld(1).run(lambda comm: (member := Member(comm, 0, fragments=4)).train(TAU) or member)[0]
    newcomer = new_member(**{"fragments": 4, **settings})

    def meet(comm):
        member = survivor if comm.rank == 0 else newcomer
        with pytest.raises(ValueError, match=f"differs from rank 0: config: {next(iter(settings))}"):
            member.reform(comm)

    ThreadWorld(2).run(meet)
