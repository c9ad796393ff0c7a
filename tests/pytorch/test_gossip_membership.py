"""Gossiping workers that come and go: one mean of what their models show, and a graph of those that are left."""

import numpy as np
import pytest
import torch

from hvd_slowmo.comm.threads import ThreadWorld, WorldError
from hvd_slowmo.torch import SGP, SlowMo, SlowMoConfig
from hvd_slowmo_torch.membership import reform
from reference.gossip import run_gossip
from support.gossip_membership import METHODS, PAIR
from support.membership import CHUNKS, GRADIENTS, LENGTH, LR, Breaking, Killed, train, values

BETA, TAU = 0.5, 6


class Short(SlowMo):
    _chunk_bytes = 8 * LENGTH // CHUNKS


def member_of(comm, number, config, momentum=0.0):
    torch.manual_seed(number)
    model = torch.nn.Linear(LENGTH, 1, bias=False, dtype=torch.float64)
    broken = Breaking(comm, WorldError if number < 2 else Killed)
    optimizer = Short(torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum), model, config, comm=broken)
    optimizer.worker.elastic = optimizer.worker.assembly.machine.meetings.tracks = True
    return model, optimizer, broken


def lost(config, steps, messages):
    """Let three workers make these steps, and lose the last one once so many messages of the next have come."""

    def before(comm):
        model, optimizer, broken = member_of(comm, comm.rank, config)
        train(model, optimizer, comm.rank, steps)
        vectors = {name: optimizer.worker.store.vectors[name][0].numpy().copy() for name in config.vectors}
        broken.left = messages[comm.rank]
        with pytest.raises((WorldError, Killed)):
            train(model, optimizer, comm.rank, 3)
        return model, optimizer, vectors

    return ThreadWorld(3).run(before)[:2]


@pytest.mark.filterwarnings("ignore:tau=None")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("messages", [(0, 0, 0), (2, 1, 1), (CHUNKS, CHUNKS - 1, CHUNKS - 1)])
def test_the_mean_of_the_survivors_models_clears_weights_and_messages(method, messages):
    """Some chunks of the last step may be mixed on one of them: the models show parameters in any case."""
    pair = lost(SlowMoConfig(tau=None, gossip=METHODS[method], beta=0.0), 4, messages)
    mean = np.mean([values(model) for model, _, _ in pair], axis=0)

    def after(comm):
        model, optimizer, _ = pair[comm.rank]
        reform(optimizer.worker, comm)
        began = values(model), optimizer.steps
        train(model, optimizer, comm.rank, 5)
        return *began, values(model), optimizer.steps

    found = ThreadWorld(2).run(after)
    # The step that was broken off is completed, by a mixing of equal parameters.
    steps = max(optimizer.steps for _, optimizer, _ in pair) - 5
    assert steps in (5, 6)  # one of them may have had all messages of the fifth
    for began, count, _, last in found:
        np.testing.assert_allclose(began, mean, atol=1e-13)
        assert (count, last) == (steps, steps + 5)
    reference = run_gossip(
        mean, lambda i, batch, z: GRADIENTS[i] * (batch > 0), topology=PAIR, lr=LR, steps=6, tau=None,
        overlap=method == "osgp", gossip="dpsgd" if method == "dpsgd" else "sgp",
    )  # fmt: skip
    for number, (_, _, x, _) in enumerate(found):
        np.testing.assert_allclose(x, reference[-1].z[number], atol=1e-13)
    weights = pair[0][1].worker.progress.mixing
    np.testing.assert_allclose(weights.weights, reference[-1].w, atol=1e-14)
    np.testing.assert_allclose(weights.arriving.sum(), reference[-1].flying_w.sum(), atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_the_outer_step_of_a_block_with_a_loss_is_that_of_the_survivors(method):
    config = SlowMoConfig(tau=TAU, gossip=METHODS[method], beta=BETA)
    pair = lost(config, TAU + 2, (0, 0, 0))
    anchor, v = pair[0][2]["anchor"], pair[0][2]["v"]
    start = [values(model) for model, _, _ in pair]

    def after(comm):
        model, optimizer, _ = pair[comm.rank]
        reform(optimizer.worker, comm)
        train(model, optimizer, comm.rank, TAU - 3)
        store = optimizer.worker.store
        return values(model), store.vectors["anchor"][0].numpy(), store.vectors["v"][0].numpy(), optimizer.steps

    found = ThreadWorld(2).run(after)
    mean = np.mean(start, axis=0) - LR * (TAU - 3) * GRADIENTS[:2].mean(axis=0)
    v = BETA * v + anchor - mean
    for last, own_anchor, own_v, steps in found:
        np.testing.assert_allclose(last, anchor - v, atol=1e-13)
        np.testing.assert_allclose(own_v, v, atol=1e-13)
        assert np.array_equal(last, own_anchor)
        assert np.array_equal(last, found[0][0])
        assert steps == 2 * TAU


@pytest.mark.parametrize("written", [(0, 0), (1, 2), (2, 2), (2, 3)])
def test_chunks_of_an_outer_step_that_have_been_written_are_not_averaged_again(written):
    config = SlowMoConfig(tau=2, gossip=SGP(), beta=BETA)
    pair = lost(config, 3, tuple(1 + chunks for chunks in (*written, max(written))))
    anchor = pair[0][2]["anchor"]
    reached = [values(model) for model, _, _ in pair]

    def after(comm):
        model, optimizer, _ = pair[comm.rank]
        reform(optimizer.worker, comm)
        return values(model), [optimizer.worker.store.vectors[name][0].numpy() for name in ("anchor", "v")]

    (one, vectors), (other, others) = ThreadWorld(2).run(after)
    assert np.array_equal(one, other)
    assert all(np.array_equal(a, b) for a, b in zip(vectors, others, strict=True))
    done = slice(max(written) * LENGTH // CHUNKS)
    rest = slice(done.stop, None)
    np.testing.assert_allclose(one[done], reached[written.index(max(written))][done], atol=1e-14)
    if max(written) < CHUNKS:
        v = BETA * pair[0][2]["v"][rest] + anchor[rest] - np.mean(reached, axis=0)[rest]
        np.testing.assert_allclose(one[rest], anchor[rest] - v, atol=1e-13)
        np.testing.assert_allclose(vectors[1][rest], v, atol=1e-13)
        assert np.array_equal(one, vectors[0])


@pytest.mark.filterwarnings("ignore:tau=None")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tau", [None, TAU])
def test_a_newcomer_takes_the_others_mean_and_gossips_with_them(method, tau):
    config = SlowMoConfig(tau=tau, gossip=METHODS[method], beta=0.0 if tau is None else BETA)

    def before(comm):
        model, optimizer, _ = member_of(comm, comm.rank, config)
        train(model, optimizer, comm.rank, 4)
        optimizer.worker.assembly.machine.abandon()
        return model, optimizer

    pair = ThreadWorld(2).run(before)
    mean = np.mean([values(model) for model, _ in pair], axis=0)

    def after(comm):
        if comm.rank == 2:
            model, optimizer, _ = member_of(ThreadWorld(1).member(0), 2, config)
            optimizer.worker.started = False
        else:
            model, optimizer = pair[comm.rank]
        reformed = reform(optimizer.worker, comm)
        began = values(model)
        train(model, optimizer, comm.rank, 2)
        return began, values(model), optimizer.steps, reformed.newcomers

    found = ThreadWorld(3).run(after)
    for began, last, steps, newcomers in found:
        np.testing.assert_allclose(began, mean, atol=1e-14)
        assert np.array_equal(began, found[0][0])
        assert (steps, newcomers) == (6, (2,))
        assert tau is None or np.array_equal(last, found[0][1])  # the end of the block
