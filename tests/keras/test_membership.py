"""Keras workers that come and go: nothing of an outer step is written before all of its messages are there."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvd_slowmo.comm.threads import ThreadWorld, WorldError
from support.keras_member import Member, Short
from support.membership import BETA, CHUNKS, GRADIENTS, LENGTH, LR, TAU, Breaking, Killed, outer

pytestmark = [pytest.mark.slow]
tf.config.threading.set_inter_op_parallelism_threads(16)  # see test_threads.py


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 2), (CHUNKS, CHUNKS - 1), (CHUNKS - 1, CHUNKS)])
@pytest.mark.sample("1-2")
def test_a_worker_lost_in_an_outer_step_costs_only_its_own_block(first, second):
    """The survivors have received `first` and `second` chunks of the outer step when they notice."""
    reached = [first, second, max(first, second)]

    def before(comm):
        broken = Breaking(comm, WorldError if comm.rank < 2 else Killed)
        member = Member(comm.rank, broken)
        member.reform(broken)
        start = member.values
        member.train(TAU)
        between = member.values
        broken.left = 1 + reached[comm.rank]  # the ledger, and so many chunks
        try:
            member.train(TAU)
        except tf.errors.OpError:
            assert reached[comm.rank] < CHUNKS
        return member, start, between

    everyone = ThreadWorld(3).run(before)
    start = everyone[0][1]

    def after(comm):
        member = everyone[comm.rank][0]
        kept = member.values
        reformed = member.reform(comm)
        resumed, v, steps = member.values, member.vector("v"), member.optimizer.steps
        member.train(TAU)
        return kept, resumed, v, steps, member.values, member.optimizer.steps, reformed

    found = ThreadWorld(2).run(after)
    anchor, v = outer(start, np.zeros(LENGTH), [start - LR * TAU * GRADIENTS[n] for n in range(3)], [1, 1, 1])
    np.testing.assert_allclose(everyone[0][2], anchor, atol=1e-14)
    models = [anchor - LR * TAU * GRADIENTS[n] for n in range(3)]
    done = CHUNKS in (first, second)
    for n in range(2):
        if reached[n] < CHUNKS:  # the inner step is made, and nothing else
            np.testing.assert_allclose(found[n][0], models[n], atol=1e-13)
    anchor, v = outer(anchor, v, models, [1, 1, 1]) if done else outer(anchor, v, models[:2], [1, 1])
    last = outer(anchor, v, [anchor - LR * TAU * GRADIENTS[n] for n in range(2)], [1, 1])[0]
    for n, (_, resumed, held, steps, end, end_steps, reformed) in enumerate(found):
        np.testing.assert_allclose(resumed, anchor, atol=1e-13)
        np.testing.assert_allclose(held, LR * v, atol=1e-13)  # kept in units of the parameters
        np.testing.assert_allclose(end, last, atol=1e-13)
        assert (steps, end_steps) == (2 * TAU, 3 * TAU)
        assert reformed.newcomers == ()
        assert (n in reformed.behind) == (done and reached[n] < CHUNKS)
        assert int(found[n][5]) == int(everyone[n][0].optimizer.iterations.numpy())
    assert np.array_equal(found[0][1], found[1][1])
    assert np.array_equal(found[0][4], found[1][4])


def test_a_newcomer_starts_at_the_anchor_and_weighs_its_own_steps():
    """It has the leader's inner state too: momentum, kept across outer steps here."""
    world = ThreadWorld(2)

    def before(comm):
        member = Member(comm.rank, comm, momentum=0.5)
        member.reform(comm)
        member.train(TAU + 1)  # one step into the second block
        return member

    everyone = world.run(before)
    anchor = everyone[0].vector("anchor")

    def after(comm):
        member = everyone[comm.rank] if comm.rank < 2 else Member(2, comm, momentum=0.5)
        kept = member.values
        reformed = member.reform(comm)
        began, inner = member.values, member.optimizer.inner_optimizer.variables[-1].numpy().copy()
        assert comm.rank == 2 or np.array_equal(kept, began)
        member.train(TAU - 2)
        before_outer = member.values
        member.train(1)
        return began, inner, before_outer, member.values, member.optimizer.steps, reformed, member

    found = ThreadWorld(3).run(after)
    assert np.array_equal(found[2][0], anchor)
    assert np.array_equal(found[2][1], found[0][1])
    for began, _, _, last, steps, reformed, _ in found:
        assert steps == 2 * TAU
        assert (reformed.newcomers, reformed.leader, reformed.behind) == ((2,), 0, ())
        assert np.array_equal(last, found[0][3])
        assert began.shape == last.shape
    # The mean, by hand: each worker's last inner step from what it had before, momentum included.
    ends = []
    for _, _, before_outer, *_rest, member in found:
        momentum = member.optimizer.inner_optimizer.variables[-1].numpy()  # after that step; not reset by default
        assert momentum.shape == (LENGTH,)
        ends.append(before_outer + momentum)
    mean = np.average(ends, axis=0, weights=[TAU, TAU, TAU - 1])
    v = everyone[0].vector("v")  # now after the outer step
    np.testing.assert_allclose(found[0][3], anchor - v, atol=1e-13)
    previous = outer_v_before(everyone)
    np.testing.assert_allclose(v, BETA * previous + anchor - mean, atol=1e-13)


def outer_v_before(everyone):
    """Return v before the last outer step: beta times the zeros of the start, and the first block's gradient."""
    start = np.random.default_rng(0).standard_normal(LENGTH)
    models = []
    for n in range(2):
        x, m = start.copy(), np.zeros(LENGTH)
        for _ in range(TAU):
            m = 0.5 * m - LR * GRADIENTS[n]
            x = x + m
        models.append(x)
    return start - np.mean(models, axis=0)


@pytest.mark.thorough
def test_averaged_gradients_leave_all_with_the_leaders_state():
    def before(comm):
        broken = Breaking(comm, WorldError if comm.rank < 2 else Killed)
        member = Member(comm.rank, broken, warmup_steps=6, decay=0.1)
        member.reform(broken)
        member.train(2)
        made = member.values, int(member.optimizer.inner_optimizer.iterations.numpy())
        broken.left = 1  # the exchange of gradients is broken off behind its attendance
        with pytest.raises(tf.errors.OpError):
            member.train(1)
        assert np.array_equal(member.values, made[0])  # weight decay does not depend on gradients
        assert int(member.optimizer.inner_optimizer.iterations.numpy()) == made[1] == 2
        return member

    everyone = ThreadWorld(3).run(before)

    def after(comm):
        member = everyone[comm.rank]
        kept = member.values
        member.reform(comm)
        assert np.array_equal(member.values, everyone[0].values)
        member.train(1)
        return kept, member.values, member.optimizer.steps

    (first, one, steps), (second, other, other_steps) = ThreadWorld(2).run(after)
    assert np.array_equal(first, second)
    np.testing.assert_allclose(one, first * (1 - 0.1 * LR) - LR * GRADIENTS[:2].mean(axis=0), atol=1e-13)
    assert np.array_equal(one, other)
    assert steps == other_steps == 3


@pytest.mark.thorough
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("newcomer", [False, True])
def test_slices_of_survivors_are_dealt_anew(monkeypatch, bits, newcomer):
    """The lost worker's slice of momentum begins with zeros; in few bits the same holds for what rounding withheld."""
    blocks = 6  # two for each of three workers, three for each of two
    gradients = np.random.default_rng(3).standard_normal((3, blocks * 1024, 1)).astype("float32")

    class Sliced(Member):
        def __init__(self, rank, comm):
            super().__init__(rank, comm, shard=True, bits=bits)
            self.weight = keras.Variable(np.random.default_rng(0).standard_normal((blocks * 1024, 1)), dtype="float32")

        def train(self, steps):
            for _ in range(steps):
                self.optimizer.apply([tf.constant(gradients[self.number])], [self.weight])

        def slices(self, name, size):
            whole = np.zeros(blocks * 1024, "float32")
            own = slice(self.rank * blocks // size * 1024, (self.rank + 1) * blocks // size * 1024)
            whole[own] = self.optimizer.worker.variables.slices[name][0].numpy()
            return whole

    monkeypatch.setattr(Short, "_chunk_bytes", 4 * blocks * 1024)

    def before(comm):
        broken = Breaking(comm, WorldError if comm.rank < 2 else Killed)
        member = Sliced(comm.rank, broken)
        member.reform(broken)
        member.train(2 * TAU - 1)
        member.rank, broken.left = comm.rank, 0
        kept = {name: member.slices(name, 3) for name in member.optimizer.worker.variables.slices}
        with pytest.raises(tf.errors.OpError):
            member.train(1)
        return member, kept

    everyone = ThreadWorld(3).run(before)
    size = 3 if newcomer else 2

    def after(comm):
        member = everyone[comm.rank][0] if comm.rank < 2 else Sliced(2, comm)
        member.rank = comm.rank
        member.optimizer.worker.variables.made.assign(2 * TAU - 1) if comm.rank < 2 else None  # no outer step follows
        member.reform(comm)
        return {name: member.slices(name, size) for name in member.optimizer.worker.variables.slices}, member.values

    found = ThreadWorld(size).run(after)
    lost = np.arange(blocks * 1024) >= 4 * 1024
    for name in everyone[0][1]:
        had, have = everyone[0][1][name] + everyone[1][1][name], sum(slices[name] for slices, _ in found)
        assert np.all(had[lost] == 0)
        assert np.any(had[~lost])
        if name == "anchor":  # the mean of the survivors in its place
            mean = np.mean([values[:, 0] for _, values in found[:2]], axis=0)
            np.testing.assert_allclose(have[lost], mean[lost], atol=1e-6)
            assert np.array_equal(have[~lost], had[~lost])
        else:
            assert np.array_equal(have, had)
    if newcomer and bits == 32:
        assert np.array_equal(found[2][1][:, 0], sum(slices["anchor"] for slices, _ in found))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.thorough
def test_slices_of_an_outer_step_that_was_broken_off_are_those_of_the_step_before(monkeypatch, bits, traced):
    """The first chunk has been exchanged, and not the second: neither its slices nor its residual may be new."""
    length, chunks = 2 * 3 * 1024, 2
    gradients = np.random.default_rng(3).standard_normal((3, length, 1)).astype("float32")
    monkeypatch.setattr(Short, "_chunk_bytes", 4 * length // chunks)

    class Sliced(Member):
        def __init__(self, rank, comm):
            super().__init__(rank, comm, traced=traced, shard=True, bits=bits)
            self.weight = keras.Variable(np.random.default_rng(0).standard_normal((length, 1)), dtype="float32")

        def train(self, steps):
            for _ in range(steps):
                self._step(tf.constant(gradients[self.number]))

        def kept(self):
            variables = self.optimizer.worker.variables
            every = {**variables.vectors, **variables.slices}
            return {f"{name}.{n}": v.numpy().copy() for name, each in every.items() for n, v in each.items()}

    def work(comm):
        broken = Breaking(comm, WorldError if comm.rank < 2 else Killed)
        member = Sliced(comm.rank, broken)
        member.reform(broken)
        member.train(2 * TAU - 1)
        before = member.kept()
        broken.left = 1 + 2 + 1  # the ledger, the first chunk's two phases, and one of the second's
        with pytest.raises(tf.errors.OpError):
            member.train(1)
        return before, member.kept()

    for before, after in ThreadWorld(3).run(work):
        for name, values in before.items():
            assert np.array_equal(after[name], values), name
