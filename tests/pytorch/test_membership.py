"""Workers that come and go: survivors keep their part of a block, and finish an outer step that was broken off."""

import numpy as np
import pytest
import torch

from hvd_slowmo.comm.threads import ThreadWorld, WorldError
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from hvd_slowmo_torch.membership import reform
from support.membership import BETA, CHUNKS, GRADIENTS, LENGTH, LR, TAU, Breaking, Killed, outer, train, values


class Short(SlowMo):
    _chunk_bytes = 8 * LENGTH // CHUNKS


def worker_of(comm, config):
    torch.manual_seed(comm.rank)
    model = torch.nn.Linear(LENGTH, 1, bias=False, dtype=torch.float64)
    optimizer = Short(torch.optim.SGD(model.parameters(), lr=LR), model, config, comm=comm)
    optimizer.worker.elastic = optimizer.worker.assembly.machine.meetings.tracks = True
    return model, optimizer


def new_worker(config):
    """Return a model and an optimizer that has not been started."""
    model, optimizer = worker_of(ThreadWorld(1).member(0), config)
    optimizer.worker.started = False
    return model, optimizer


def broken_off(config, own_steps, waits, joining=0):
    """Let workers train until the last one is lost in an outer step; return model, optimizer and start of each.

    Args:
        own_steps: of each worker before it.
        waits: of each worker in the outer step, before it fails.
        joining: the first so many answer it from their joins.
    """

    def work(comm):
        broken = Breaking(comm, WorldError if comm.rank < comm.size - 1 else Killed)
        model, optimizer = worker_of(broken, config)
        start = values(model)
        train(model, optimizer, comm.rank, min(own_steps[comm.rank], TAU - 1))
        broken.left = waits[comm.rank]
        with pytest.raises((WorldError, Killed)):
            optimizer.join() if comm.rank < joining else train(model, optimizer, comm.rank, 1 + TAU)
        return model, optimizer, start

    return ThreadWorld(len(own_steps)).run(work)


def vectors_of(optimizer):
    """Return copies of anchor and momentum."""
    return [optimizer.worker.store.vectors[name][0].numpy().copy() for name in ("anchor", "v")]


@pytest.mark.parametrize(
    ("first", "second"),
    # One may have received a chunk that the other has sent and not received.
    [(a, b) for a in range(CHUNKS + 1) for b in range(CHUNKS + 1) if abs(a - b) <= 1],
)
def test_a_worker_lost_in_an_outer_step_costs_only_its_own_block(first, second):
    """The survivors have written `first` and `second` chunks of the outer step when they notice."""
    config = SlowMoConfig(tau=TAU, beta=BETA)
    reached = [first, second, max(first, second)]

    def before(comm):
        broken = Breaking(comm, WorldError if comm.rank < 2 else Killed)
        model, optimizer = worker_of(broken, config)
        start = values(model)
        train(model, optimizer, comm.rank, TAU)
        between = values(model)
        broken.left = 1 + reached[comm.rank]  # the ledger, and so many chunks
        try:
            train(model, optimizer, comm.rank, TAU)
        except (WorldError, Killed):
            assert reached[comm.rank] <= CHUNKS
        return model, optimizer, start, between

    everyone = ThreadWorld(3).run(before, return_exceptions=True)
    start = everyone[0][2]

    def after(comm):
        model, optimizer = everyone[comm.rank][:2]
        reformed = reform(optimizer.worker, comm)
        resumed = values(model)
        train(model, optimizer, comm.rank, TAU)
        return resumed, values(model), optimizer.steps, reformed

    found = ThreadWorld(2).run(after)

    anchor, v = outer(start, np.zeros(LENGTH), [start - LR * TAU * GRADIENTS[n] for n in range(3)], [1, 1, 1])
    np.testing.assert_allclose(everyone[0][3], anchor, atol=1e-14)
    models = [anchor - LR * TAU * GRADIENTS[n] for n in range(3)]
    of_three, of_two = outer(anchor, v, models, [1, 1, 1]), outer(anchor, v, models[:2], [1, 1])
    done = max(first, second) * LENGTH // CHUNKS
    anchor, v = (np.concatenate([a[:done], b[done:]]) for a, b in zip(of_three, of_two, strict=True))
    for resumed, last, steps, reformed in found:
        np.testing.assert_allclose(resumed, anchor, atol=1e-13)
        models = [anchor - LR * TAU * GRADIENTS[n] for n in range(2)]
        np.testing.assert_allclose(last, outer(anchor, v, models, [1, 1])[0], atol=1e-13)
        assert steps == 3 * TAU
        assert reformed.newcomers == ()
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert np.array_equal(one, other)


def test_a_survivor_of_an_older_block_weighs_nothing_in_the_newer_one():
    """One has missed the last chunk of an outer step; the other notices the loss only at its next outer step."""
    config = SlowMoConfig(tau=TAU, beta=BETA)

    def before(comm):
        broken = Breaking(comm, WorldError if comm.rank < 2 else Killed)
        model, optimizer = worker_of(broken, config)
        start = values(model)
        train(model, optimizer, comm.rank, TAU - 1)
        broken.left = [CHUNKS + 1, CHUNKS, CHUNKS + 1][comm.rank]  # the ledger, and so many chunks less one
        with pytest.raises((WorldError, Killed)):
            train(model, optimizer, comm.rank, TAU + 1)
        return model, optimizer, start

    everyone = ThreadWorld(3).run(before)
    start = everyone[0][2]

    def after(comm):
        model, optimizer = everyone[comm.rank][:2]
        reformed = reform(optimizer.worker, comm)
        return values(model), optimizer.steps, reformed

    found = ThreadWorld(2).run(after)
    anchor, v = outer(start, np.zeros(LENGTH), [start - LR * TAU * GRADIENTS[n] for n in range(3)], [1, 1, 1])
    expected = outer(anchor, v, [anchor - LR * TAU * GRADIENTS[0]], [1])[0]
    for last, steps, reformed in found:
        np.testing.assert_allclose(last, expected, atol=1e-13)
        assert steps == 2 * TAU
        assert (reformed.leader, reformed.newcomers, reformed.behind) == (0, (), (1,))
    assert np.array_equal(found[0][0], found[1][0])


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (3, 2)])
def test_an_outer_step_that_was_answered_from_joins_is_written_by_all_or_none(first, second):
    """The one that trained is lost; the others have written `first` and `second` chunks of its outer step."""
    config = SlowMoConfig(tau=TAU, beta=BETA)
    own_steps, reached = (2, 3, TAU), (first, second, max(first, second))

    # The ledger, and so many chunks.
    everyone = broken_off(config, own_steps, [1 + chunks for chunks in reached], joining=2)
    start = everyone[0][2]

    def after(comm):
        model, optimizer = everyone[comm.rank][:2]
        reformed = reform(optimizer.worker, comm)
        vectors = vectors_of(optimizer)
        resumed, steps = values(model), optimizer.steps
        train(model, optimizer, comm.rank, TAU - steps % TAU)
        return resumed, steps, vectors, values(model), reformed

    found = ThreadWorld(2).run(after)
    models = [start - LR * own * GRADIENTS[n] for n, own in enumerate(own_steps)]
    of_three = outer(start, np.zeros(LENGTH), models, own_steps)
    done = np.arange(LENGTH) < max(first, second) * LENGTH // CHUNKS
    whole = bool(done.all())  # one has ended the outer step, and the other skips to its block
    steps = TAU if whole else 3
    anchor, v = np.where(done, of_three[0], start), np.where(done, of_three[1], 0)
    more = TAU - steps % TAU
    weights = [more] * 2 if whole else [own_steps[n] + more for n in range(2)]
    now = [np.where(done, anchor, models[n]) for n in range(2)]
    last = outer(anchor, v, [now[n] - LR * more * GRADIENTS[n] for n in range(2)], weights)[0]
    for number, (resumed, at, vectors, end, reformed) in enumerate(found):
        np.testing.assert_allclose(resumed, now[number], atol=1e-13)
        np.testing.assert_allclose(vectors[0], anchor, atol=1e-13)
        np.testing.assert_allclose(vectors[1], LR * v, atol=1e-13)
        np.testing.assert_allclose(end, last, atol=1e-13)
        assert (at, reformed.behind) == (steps, (1,) * whole)
    for one, other in zip(found[0][2], found[1][2], strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(found[0][3], found[1][3])


def test_an_outer_step_that_was_taken_again_and_broken_off_again_is_written_by_all():
    """One of two that train is lost in it, and the other one when they take it again with two that answer."""
    config = SlowMoConfig(tau=TAU, beta=BETA)
    own_steps = (2, 3, TAU, TAU)

    everyone = broken_off(config, own_steps, [0] * 4, joining=2)

    def again(comm):
        broken = Breaking(comm, WorldError if comm.rank < 2 else Killed)
        broken.left = (2, 1, 2)[comm.rank]  # the ledger, and a chunk on one of those that answer
        with pytest.raises((WorldError, Killed)):
            reform(everyone[comm.rank][1].worker, broken)

    def after(comm):
        model, optimizer = everyone[comm.rank][:2]
        reform(optimizer.worker, comm)
        return values(model), vectors_of(optimizer)

    ThreadWorld(3).run(again)
    found = ThreadWorld(2).run(after)
    start, done = everyone[0][2], np.arange(LENGTH) < LENGTH // CHUNKS
    models = [start - LR * own_steps[n] * GRADIENTS[n] for n in range(3)]
    anchor, v = outer(start, np.zeros(LENGTH), models, own_steps[:3])
    for number, (resumed, vectors) in enumerate(found):
        np.testing.assert_allclose(resumed, np.where(done, anchor, models[number]), atol=1e-13)
        np.testing.assert_allclose(vectors, [np.where(done, anchor, start), LR * np.where(done, v, 0)], atol=1e-13)
    assert np.array_equal(found[0][1], found[1][1])


def test_a_mean_at_the_end_of_a_join_that_was_broken_off_is_handed_to_nobody():
    """It is no outer step: each worker's own parameters are as good, and anchor and momentum are not concerned."""

    def before(comm):
        broken = Breaking(comm, WorldError if comm.rank < 2 else Killed)
        model, optimizer = worker_of(broken, SlowMoConfig(tau=TAU, beta=BETA))
        train(model, optimizer, comm.rank, 2)
        own = values(model)
        broken.left = (2, 1, 2)[comm.rank]  # the ledger, and a chunk
        with pytest.raises((WorldError, Killed)):
            optimizer.join()
        return model, optimizer, own

    everyone = ThreadWorld(3).run(before)
    mean = np.mean([own for _, _, own in everyone], axis=0)

    def after(comm):
        model, optimizer = everyone[comm.rank][:2]
        reform(optimizer.worker, comm)
        return values(model)

    first, second = ThreadWorld(2).run(after)
    done = np.arange(LENGTH) < LENGTH // CHUNKS
    np.testing.assert_allclose(first, np.where(done, mean, everyone[0][2]), atol=1e-14)
    np.testing.assert_array_equal(second, everyone[1][2])


def test_a_worker_in_its_join_may_have_written_more_than_the_leader():
    """All chunks that anybody in the block has written count, and none is stepped twice."""
    config = SlowMoConfig(tau=TAU, beta=BETA)
    own_steps = (TAU, 2, TAU)

    def before(comm):
        broken = Breaking(comm, WorldError if comm.rank < 2 else Killed)
        model, optimizer = worker_of(broken, config)
        start = values(model)
        train(model, optimizer, comm.rank, min(own_steps[comm.rank], TAU - 1))
        broken.left = [2, 3, 3][comm.rank]  # the ledger, and one chunk, or two
        with pytest.raises((WorldError, Killed)):
            optimizer.join() if comm.rank == 1 else train(model, optimizer, comm.rank, 1)
        return model, optimizer, start

    everyone = ThreadWorld(3).run(before)
    start = everyone[0][2]

    def after(comm):
        model, optimizer = everyone[comm.rank][:2]
        reform(optimizer.worker, comm)
        return values(model), optimizer.steps, vectors_of(optimizer)

    found = ThreadWorld(2).run(after)
    weights = np.array(own_steps) / TAU
    models = [start - LR * own_steps[n] * GRADIENTS[n] for n in range(3)]
    of_three = outer(start, np.zeros(LENGTH), models, weights)
    of_two = outer(start, np.zeros(LENGTH), models[:2], weights[:2])
    done = 2 * LENGTH // CHUNKS
    anchor, v = (np.concatenate([a[:done], b[done:]]) for a, b in zip(of_three, of_two, strict=True))
    for last, steps, vectors in found:
        np.testing.assert_allclose(last, anchor, atol=1e-13)
        np.testing.assert_allclose(vectors[1], LR * v, atol=1e-13)  # kept in units of the parameters
        assert np.array_equal(last, vectors[0])
        assert steps == TAU
    assert all(np.array_equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


def test_a_newcomer_starts_at_the_anchor_and_weighs_its_own_steps():
    config = SlowMoConfig(tau=TAU, beta=BETA)

    def before(comm):
        model, optimizer = worker_of(comm, config)
        start = values(model)
        train(model, optimizer, comm.rank, TAU + 1)  # one step into the second block
        return model, optimizer, start

    everyone = ThreadWorld(2).run(before)
    start = everyone[0][2]

    def after(comm):
        if comm.rank == 2:
            model = torch.nn.Linear(LENGTH, 1, bias=False, dtype=torch.float64)
            inner = torch.optim.SGD(model.parameters(), lr=1.0)
            optimizer = Short(inner, model, config, comm=ThreadWorld(1).member(0))
            optimizer.worker.started = False
        else:
            model, optimizer = everyone[comm.rank][:2]
        kept = values(model)
        reformed = reform(optimizer.worker, comm)
        began = values(model)
        assert comm.rank == 2 or np.array_equal(kept, began)
        train(model, optimizer, comm.rank, TAU - 1)
        return began, values(model), optimizer.steps, reformed

    found = ThreadWorld(3).run(after)
    anchor, v = outer(start, np.zeros(LENGTH), [start - LR * TAU * GRADIENTS[n] for n in range(2)], [1, 1])
    np.testing.assert_allclose(found[2][0], anchor, atol=1e-14)
    steps = [TAU, TAU, TAU - 1]
    models = [anchor - LR * steps[n] * GRADIENTS[n] for n in range(3)]
    expected = outer(anchor, v, models, steps)[0]
    for _, last, count, reformed in found:
        np.testing.assert_allclose(last, expected, atol=1e-13)
        assert count == 2 * TAU
        assert reformed.newcomers == (2,)
        assert reformed.leader == 0


@pytest.mark.slow
@pytest.mark.parametrize("apart", [(0, 0), (1, 0), (0, 1)], ids=str)
@pytest.mark.parametrize("waits", range(0, 12, 2))
def test_a_newcomer_that_is_lost_while_it_starts_costs_the_survivors_nothing(waits, apart):
    """One survivor has written a chunk of the outer step, and hands it on; then the newcomer is lost, at any point."""
    config = SlowMoConfig(tau=TAU, beta=BETA)

    everyone = broken_off(config, [TAU] * 3, [2, 1, 2])  # the ledger, and a chunk on one
    start = everyone[0][2]

    def with_newcomer(comm):
        broken = Breaking(comm, WorldError if comm.rank < 2 else Killed)
        model, optimizer = everyone[comm.rank][:2] if comm.rank < 2 else new_worker(config)
        broken.left = waits + (*apart, max(apart))[comm.rank]
        try:
            reform(optimizer.worker, broken)
        except (WorldError, Killed):
            return
        with pytest.raises(WorldError):  # it was lost behind its own last message
            train(model, optimizer, 3, 1)

    def without(comm):
        optimizer = everyone[comm.rank][1]
        reform(optimizer.worker, comm)
        vectors = vectors_of(optimizer)
        return vectors, optimizer.steps

    ThreadWorld(3).run(with_newcomer)
    found = ThreadWorld(2).run(without)
    assert all(np.array_equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    models = [start - LR * TAU * GRADIENTS[n] for n in range(3)]
    of_three, of_two = (outer(start, np.zeros(LENGTH), models[:n], [1] * n) for n in (3, 2))
    done = LENGTH // CHUNKS
    for (anchor, v), steps in found:
        np.testing.assert_allclose(anchor, np.concatenate([of_three[0][:done], of_two[0][done:]]), atol=1e-13)
        np.testing.assert_allclose(v, LR * np.concatenate([of_three[1][:done], of_two[1][done:]]), atol=1e-13)
        assert steps == TAU


class Noting:
    """A Comm that notes the names of the collectives."""

    def __init__(self, comm, names):
        self._comm, self._names = comm, names
        self.rank, self.size, self.ranks, self.node = comm.rank, comm.size, comm.ranks, comm.node

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def start_sum(self, name, x):
        self._names.append(name)
        return self._comm.start_sum(name, x)

    def gather(self, name, item):
        self._names.append(name)
        return self._comm.gather(name, item)


def test_the_order_of_collectives_is_the_same_on_survivors_and_newcomers():
    """The golden sequence: one survivor, whose outer step was broken off behind its first chunk, and one newcomer."""
    config = SlowMoConfig(tau=TAU, beta=BETA)

    def before(comm):
        broken = Breaking(comm, WorldError if comm.rank == 0 else Killed)
        model, optimizer = worker_of(broken, config)
        train(model, optimizer, comm.rank, TAU - 1)
        broken.left = 2
        with pytest.raises((WorldError, Killed)):
            train(model, optimizer, comm.rank, 1)
        return model, optimizer

    survivor = ThreadWorld(2).run(before)[0]

    def after(comm):
        names = []
        if comm.rank == 0:
            model, optimizer = survivor
        else:
            model, optimizer = new_worker(config)
        reform(optimizer.worker, Noting(comm, names))
        return names, values(model), optimizer.steps

    (names, first, steps), (others, second, other_steps) = ThreadWorld(2).run(after)
    assert names == others
    values_of = [f"slowmo.values.{chunk}" for chunk in range(CHUNKS)]
    assert names == [
        "slowmo.members",
        "slowmo.digest",
        "slowmo.progress",
        "slowmo.start",
        *values_of,  # the anchor
        *values_of,  # v
        "slowmo.ledger",  # the outer step goes on
        "slowmo.model.1",
        "slowmo.model.2",
    ]
    assert np.array_equal(first, second)
    assert steps == other_steps == TAU
