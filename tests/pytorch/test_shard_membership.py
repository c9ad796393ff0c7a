"""Workers that come and go where each keeps its own slice of anchor and momentum: the slices are dealt anew.

What a lost worker has kept is lost: momentum is 0 there, and the outer step of that slice a plain mean.
"""

import logging

import numpy as np
import pytest
import torch

from hvd_slowmo.comm.threads import ThreadWorld, WorldError
from hvd_slowmo.core.parts.layout import Chunk
from hvd_slowmo.core.regroup.dealing import spans
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from hvd_slowmo_torch.membership import reform
from support.membership import Breaking, Killed, OfPyTorch

TAU, BETA, LR, LENGTH, CHUNKS = 3, 0.5, 0.25, 3 * 6144, 3
GRADIENTS = np.random.default_rng(0).standard_normal((3, LENGTH))
SIZE = LENGTH // CHUNKS  # of a chunk: six blocks, two for each of three workers, three for each of two


class Short(SlowMo):
    _chunk_bytes = 8 * SIZE


class Member(OfPyTorch):
    """One worker, and its vectors as NumPy's."""

    def __init__(self, comm, number, dtype=torch.float64, **settings):
        torch.manual_seed(number)
        self.number, self.broken = number, Breaking(comm, WorldError if number < 2 else Killed)
        self.model = torch.nn.Linear(LENGTH, 1, bias=False, dtype=dtype)
        config = SlowMoConfig(**{"tau": TAU, "beta": BETA, "shard": True, **settings})
        self.optimizer = Short(torch.optim.SGD(self.model.parameters(), lr=LR), self.model, config, comm=self.broken)
        self.worker.elastic = self.worker.assembly.machine.meetings.tracks = True
        self.start = self.values

    def slices(self, name):
        """Return the elements that this worker keeps, zeros elsewhere."""
        whole, runtime = np.zeros(LENGTH), self.worker.assembly.runtime
        for chunk in runtime.slices.chunks:
            part = runtime.slices.part(chunk)
            if part is not None:
                kept = self.worker.store.slices[name][chunk.index]
                whole[part.start : part.stop] = kept[: part.size].numpy()
        return whole

    def train(self, steps):
        for _ in range(steps):
            self.model.weight.grad = torch.tensor(GRADIENTS[self.number], dtype=self.model.weight.dtype)[None]
            self.optimizer.step()


def of_lost_worker():
    """Return where worker 2 of 3 has kept the outer state."""
    return np.tile(np.arange(SIZE) >= 2 * SIZE // 3, CHUNKS)


def lost(steps, waits, **settings):
    """Let three workers make these steps, and lose the last one after so many waits of each."""

    def before(comm):
        member = Member(comm, comm.rank, **settings)
        member.train(steps)
        member.broken.left = waits[comm.rank]
        with pytest.raises((WorldError, Killed)):
            member.train(2 * TAU)
        return member

    return ThreadWorld(3).run(before)[:2]


def outer(anchor, v, mean, keeps):
    """Return anchor and v after an outer step; where `keeps` is false, momentum begins there."""
    v = BETA * v + np.where(keeps, anchor - mean, 0)
    return np.where(keeps, anchor - v, mean), v


# An outer step waits for the ledger, and for each chunk for two phases.
@pytest.mark.parametrize("waits", [(0, 0, 0), (3, 3, 3), (4, 3, 3), (5, 4, 4), (6, 6, 6)])
def test_slices_of_survivors_are_dealt_anew(waits, caplog):
    """They have a block behind them, and have written so many chunks of the second outer step when they notice."""
    members = lost(2 * TAU - 1, waits)
    start = members[0].start
    done = np.arange(LENGTH) < max(max(0, count - 1) // 2 for count in waits) * SIZE
    with caplog.at_level(logging.WARNING, "hvd_slowmo"):

        def after(comm):
            member = members[comm.rank]
            reform(member.worker, comm)
            found = member.values, member.slices("anchor"), member.slices("v"), member.optimizer.steps
            member.train(TAU)
            return *found, member.values, member.slices("v")

        one, other = ThreadWorld(2).run(after)
    assert "33 % of the parameters" in caplog.text
    mean = GRADIENTS.mean(axis=0)
    kept = ~of_lost_worker()
    anchor, v = outer(start, np.zeros(LENGTH), start - LR * TAU * mean, True)
    of_three = outer(anchor, v, anchor - LR * TAU * mean, True)
    # An anchor that is lost becomes the survivors' mean, which is that of the step taken again.
    of_two = outer(anchor, np.where(kept, v, 0), anchor - LR * TAU * GRADIENTS[:2].mean(axis=0), kept)
    anchor, v = (np.where(done, a, b) for a, b in zip(of_three, of_two, strict=True))
    v = np.where(kept, v, 0)
    assert np.array_equal(one[0], other[0])
    np.testing.assert_allclose(one[0], anchor, atol=1e-12)
    np.testing.assert_allclose(one[1] + other[1], anchor, atol=1e-12)
    np.testing.assert_allclose(one[2] + other[2], v, atol=1e-12)
    assert np.array_equal(one[2] != 0, ~(other[2] != 0) & (one[2] + other[2] != 0))  # each has its own
    last, v = outer(anchor, v, anchor - LR * TAU * GRADIENTS[:2].mean(axis=0), True)
    assert np.array_equal(one[4], other[4])
    np.testing.assert_allclose(one[4], last, atol=1e-12)
    np.testing.assert_allclose(one[5] + other[5], v, atol=1e-12)
    assert one[3] == other[3] == 2 * TAU


def test_values_that_are_not_finite_take_no_part_in_what_replaces_a_lost_anchor():
    """Else anchor and momentum of all workers would be NaN there, though the one that is broken is excluded."""
    members = lost(2 * TAU - 1, (0, 0, 0), nonfinite="exclude")

    def after(comm):
        member = members[comm.rank]
        if comm.rank == 1:
            with torch.no_grad():
                member.model.weight[0, ::7] = torch.nan
        reform(member.worker, comm)
        return member.values, member.slices("anchor"), member.slices("v")

    one, other = ThreadWorld(2).run(after)
    kept = ~of_lost_worker()
    anchor, v = outer(members[0].start, np.zeros(LENGTH), members[0].start - LR * TAU * GRADIENTS.mean(axis=0), True)
    anchor, v = outer(anchor, np.where(kept, v, 0), anchor - LR * TAU * GRADIENTS[0], kept)
    np.testing.assert_allclose(one[2] + other[2], v, atol=1e-12)
    np.testing.assert_allclose(one[0], anchor, atol=1e-12)
    np.testing.assert_allclose(one[1] + other[1], anchor, atol=1e-12)
    assert np.array_equal(one[0], other[0])


def test_a_survivor_that_has_missed_the_end_of_an_outer_step_gives_its_part_of_it():
    """Its slice has gone to the other one, which has finished the step and made another block."""
    members = lost(2 * TAU - 1, (6, 7, 7))
    anchor, v = members[0].start, np.zeros(LENGTH)
    for _ in range(2):
        anchor, v = outer(anchor, v, anchor - LR * TAU * GRADIENTS.mean(axis=0), True)

    def after(comm):
        member = members[comm.rank]
        behind = reform(member.worker, comm).behind
        return member.values, member.slices("v"), member.optimizer.steps, behind

    one, other = ThreadWorld(2).run(after)
    kept = ~of_lost_worker()
    last, v = outer(anchor, np.where(kept, v, 0), anchor - LR * TAU * GRADIENTS[1], kept)
    assert np.array_equal(one[0], other[0])
    np.testing.assert_allclose(one[0], last, atol=1e-12)
    np.testing.assert_allclose(one[1] + other[1], v, atol=1e-12)
    assert one[2:] == other[2:] == (3 * TAU, (0,))


def test_a_newcomer_gets_a_slice_and_starts_at_the_anchor():
    def before(comm):
        member = Member(comm, comm.rank)
        member.train(TAU + 1)
        return member

    pair = ThreadWorld(2).run(before)
    start = pair[0].start

    def after(comm):
        if comm.rank < 2:
            member = pair[comm.rank]
        else:
            member = Member(ThreadWorld(1).member(0), 2)
            member.worker.started = False
        reform(member.worker, comm)
        found = member.values, member.slices("anchor"), member.slices("v")
        member.train(TAU - 1)
        return *found, member.values, member.optimizer.steps

    found = ThreadWorld(3).run(after)
    anchor, v = outer(start, np.zeros(LENGTH), start - LR * TAU * GRADIENTS[:2].mean(axis=0), True)
    np.testing.assert_allclose(found[2][0], anchor, atol=1e-12)
    np.testing.assert_allclose(sum(each[1] for each in found), anchor, atol=1e-12)
    np.testing.assert_allclose(sum(each[2] for each in found), v, atol=1e-12)
    models = [anchor - LR * steps * g for steps, g in zip((TAU, TAU, TAU - 1), GRADIENTS, strict=True)]
    last, _ = outer(anchor, v, np.average(models, axis=0, weights=(TAU, TAU, TAU - 1)), True)
    for *_, values, steps in found:
        np.testing.assert_allclose(values, last, atol=1e-12)
        assert np.array_equal(values, found[0][3])
        assert steps == 2 * TAU


def test_a_second_loss_while_slices_are_dealt_loses_none():
    members = lost(2 * TAU - 1, (0, 0, 0))
    anchors = [member.slices("anchor") for member in members]

    def broken_off(comm):
        broken = Breaking(comm, WorldError)
        broken.left = 3
        with pytest.raises(WorldError):
            reform(members[comm.rank].worker, broken)

    ThreadWorld(2).run(broken_off)

    def after(comm):
        reform(members[comm.rank].worker, comm)
        return members[comm.rank].values, members[comm.rank].slices("v")

    one, other = ThreadWorld(2).run(after)
    kept, anchor = ~of_lost_worker(), anchors[0] + anchors[1]
    v = np.where(kept, LR * TAU * GRADIENTS.mean(axis=0), 0)  # of the first block
    mean = members[0].start - LR * TAU * GRADIENTS.mean(axis=0) - LR * TAU * GRADIENTS[:2].mean(axis=0)
    expected, v = outer(anchor, v, mean, kept)
    assert np.array_equal(one[0], other[0])
    np.testing.assert_allclose(one[0], expected, atol=1e-12)
    np.testing.assert_allclose(one[1] + other[1], v, atol=1e-12)


def test_in_few_bits_momentum_and_what_is_owed_are_dealt_anew():
    members = lost(TAU, (0, 0, 0), dtype=torch.float32, bits=8)
    before = [{name: member.slices(name) for name in ("v", "slice_residual")} for member in members]

    def after(comm):
        member = members[comm.rank]
        member.worker.interrupted = None  # and no outer step follows
        reform(member.worker, comm)
        return {name: member.slices(name) for name in ("v", "slice_residual")}, member.values

    (one, _), (other, _) = ThreadWorld(2).run(after)
    for name in ("v", "slice_residual"):
        had = before[0][name] + before[1][name]
        assert np.any(had)
        assert np.array_equal(one[name] + other[name], had)


def test_each_part_of_a_chunk_has_one_giver():
    chunk = Chunk(0, 0, "parameter", 0, 6 * 1024 - 5)
    assert [tuple(each) for each in spans(chunk, [(0, 3), (1, 3), None])] == [
        (0, 2048, 0),
        (2048, 4096, 1),
        (4096, 6139, None),
    ]
    # One has its new slice already, of two, and another its former one, of three.
    assert [tuple(each) for each in spans(chunk, [(0, 2), (1, 3)])] == [
        (0, 3072, 0),
        (3072, 4096, 1),
        (4096, 6139, None),
    ]
    assert [tuple(each) for each in spans(chunk, [None, (1, 2)])] == [(0, 3072, None), (3072, 6139, 1)]
