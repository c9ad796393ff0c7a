"""Elastic jobs of both frameworks: a PyTorch worker writes an outer step chunk by chunk, a Keras worker at once."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import hvd_slowmo.tf as slowmo_tf
import hvd_slowmo.torch as slowmo_torch
from hvd_slowmo.comm.threads import ThreadWorld, WorldError
from support.gossip_membership import METHODS
from support.late_membership import BOTH, masks_of, together_again
from support.membership import BETA, CHUNKS, GRADIENTS, LENGTH, LR, TAU, LateOracle, outer
from support.mixed_member import LOST, again, lost, train_until_lost
from support.trainings.keras import GraphComm, doubles
from support.trainings.mixed import TorchComm

pytestmark = [pytest.mark.slow]
tf.config.threading.set_inter_op_parallelism_threads(16)  # see tests/keras/test_threads.py
ORDERS = [("torch", "keras"), ("keras", "torch")]


class UpTo:
    """A Comm whose workers are lost when a sum of this name begins."""

    def __init__(self, comm, name):
        self._comm, self._name = comm, name
        self.rank, self.size, self.ranks, self.node = comm.rank, comm.size, comm.ranks, comm.node

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def start_sum(self, name, x):
        if name == self._name:
            raise WorldError("lost")
        return self._comm.start_sum(name, x)


def blocks(anchor, v, steps, workers):
    """Return anchor and v after a block in which these workers have made so many steps each."""
    models = [anchor - LR * own * GRADIENTS[n] for n, own in zip(workers, steps, strict=True)]
    return outer(anchor, v, models, steps)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 1), (2, 1), (1, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("kinds", ORDERS, ids="-".join)
@pytest.mark.sample("keras-torch-3-2")
def test_a_worker_lost_in_an_outer_step_costs_only_its_own_block(kinds, first, second):
    """The survivors have received `first` and `second` chunks of the outer step when they notice."""
    reached = [first, second, max(first, second)]

    def work(member):
        member.start = member.values
        member.train(TAU)
        member.broken.left = 1 + reached[member.number]  # the ledger, and so many chunks
        if reached[member.number] < CHUNKS:
            with pytest.raises(LOST):
                member.train(TAU)
        else:
            member.train(TAU)

    members = lost((*kinds, "torch"), work)
    start = members[0].start

    def then(member, reformed):
        resumed, steps = member.values, member.optimizer.steps
        member.train(TAU)
        return resumed, steps, member.values, member.vector("v"), reformed

    found = again(members, then)
    anchor, v = blocks(start, np.zeros(LENGTH), [TAU] * 3, range(3))
    of_three, of_two = blocks(anchor, v, [TAU] * 3, range(3)), blocks(anchor, v, [TAU] * 2, range(2))
    done = max(first, second)
    if done < CHUNKS:  # a Keras worker has written nothing yet
        done = reached[kinds.index("torch")]
    done *= LENGTH // CHUNKS
    anchor, v = (np.concatenate([a[:done], b[done:]]) for a, b in zip(of_three, of_two, strict=True))
    last, last_v = blocks(anchor, v, [TAU] * 2, range(2))
    for number, (resumed, steps, end, end_v, reformed) in enumerate(found):
        np.testing.assert_allclose(resumed, anchor, atol=1e-13)
        np.testing.assert_allclose(end, last, atol=1e-13)
        np.testing.assert_allclose(end_v, LR * last_v, atol=1e-13)  # kept in units of the parameters
        assert (steps, reformed.newcomers) == (2 * TAU, ())
        assert (number in reformed.behind) == (max(first, second) == CHUNKS and reached[number] < CHUNKS)
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][2], found[1][2])


@pytest.mark.parametrize("kinds", ORDERS, ids="-".join)
@pytest.mark.parametrize("new", ["torch", "keras"])
@pytest.mark.sample("keras-keras-torch")
def test_a_newcomer_starts_at_the_anchor_with_the_inner_state_of_its_framework(kinds, new):
    def work(member):
        member.start = member.values
        member.train(TAU + 1)  # one step into the second block
        if member.number < 2:
            member.momentum_before = member.momentum

    members = lost((*kinds, "torch"), work, momentum=0.5)
    anchor = members[0].vector("anchor")

    def then(member, reformed):
        began = member.values, member.momentum
        member.train(TAU - 1)
        return *began, member.values, member.optimizer.steps, reformed

    found = again(members, then, new=(new,), momentum=0.5)
    np.testing.assert_array_equal(found[2][0], anchor)
    np.testing.assert_allclose(found[2][1], members[kinds.index(new)].momentum_before, atol=1e-13)
    for _, _, values, steps, reformed in found:
        np.testing.assert_array_equal(values, found[0][2])
        assert (steps, reformed.newcomers) == (2 * TAU, (2,))
        assert reformed.job.frameworks == tuple({"torch": "PyTorch", "keras": "Keras"}[k] for k in (*kinds, new))


def test_what_a_keras_worker_was_handed_of_an_outer_step_is_not_taken_twice():
    """The PyTorch worker, which had written a chunk, is lost too once it has handed it over."""

    def work(member):
        member.start = member.values
        member.broken.left = 1 + (member.number == 0)  # the ledger, and a chunk
        train_until_lost(member)

    members = lost(("torch", "keras", "torch"), work)

    def lost_again(comm):
        with pytest.raises(LOST):
            members[comm.rank].reform(UpTo(comm, "slowmo.ledger"))

    with doubles():
        ThreadWorld(2).run(lost_again)
    (found,) = again([members[1]], lambda member, reformed: (member.values, member.optimizer.steps))
    start, done = members[0].start, LENGTH // CHUNKS
    of_three, alone = (blocks(start, np.zeros(LENGTH), [TAU] * len(w), w)[0] for w in (range(3), [1]))
    np.testing.assert_allclose(found[0], np.concatenate([of_three[:done], alone[done:]]), atol=1e-13)
    assert found[1] == TAU


@pytest.mark.parametrize("kinds", ORDERS, ids="-".join)
@pytest.mark.sample("keras-torch")
def test_an_outer_step_that_was_answered_from_joins_is_written_by_both(kinds):
    """The one that trained is lost when the PyTorch worker has written a chunk; a Keras worker has written none."""

    def work(member):
        member.start = member.values
        if member.number < 2:
            member.train(1 + member.number)
        else:
            member.train(TAU - 1)
        member.broken.left = 2  # the ledger, and a chunk
        with pytest.raises(LOST):
            member.join() if member.number < 2 else member.train(1 + TAU)

    members = lost((*kinds, "torch"), work)

    def then(member, reformed):
        resumed, steps, vectors = member.values, member.optimizer.steps, [member.vector(n) for n in ("anchor", "v")]
        member.join()
        return resumed, steps, vectors, member.values

    found = again(members, then)
    start, done = members[0].start, np.arange(LENGTH) < LENGTH // CHUNKS
    anchor, v = (np.where(done, x, y) for x, y in zip(blocks(start, 0, [1, 2, TAU], range(3)), (start, 0), strict=True))
    now = [np.where(done, anchor, start - LR * (1 + n) * GRADIENTS[n]) for n in BOTH]
    for number, (resumed, steps, vectors, joined) in enumerate(found):
        assert steps == 2
        np.testing.assert_allclose(resumed, now[number], atol=1e-13)
        np.testing.assert_allclose(vectors, [anchor, LR * v], atol=1e-13)
        np.testing.assert_allclose(joined, np.average(now, axis=0, weights=[1, 2]), atol=1e-13)
    assert np.array_equal(found[0][2], found[1][2])
    assert np.array_equal(found[0][3], found[1][3])


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("kinds", ORDERS, ids="-".join)
@pytest.mark.thorough
def test_late_exchanges_are_sent_again_by_those_that_are_left(kinds, fragments):
    """The Keras worker, whose exchange belongs to its step, has not made the step that the PyTorch worker has."""
    first = TAU // fragments

    def work(member):
        member.start = member.values
        member.broken.left = 0
        train_until_lost(member)

    members = lost((*kinds, "torch"), work, delay=1, fragments=fragments)
    ahead = kinds.index("torch")
    oracle = LateOracle(members[0].start, masks_of(members[ahead].optimizer.worker.assembly.layout.layout), 3, delay=1)
    oracle.train(range(3), first)
    oracle.inner([ahead])
    oracle.step += 1
    oracle.events(BOTH)
    with doubles():
        reformed = together_again(members, oracle, first + 1)
    assert (reformed.leader, reformed.behind) == (ahead, ())


@pytest.mark.parametrize("kinds", ORDERS, ids="-".join)
@pytest.mark.sample("keras-torch")
def test_averaged_gradients_leave_both_frameworks_equal(kinds):
    def work(member):
        member.start = member.values
        member.train(3)
        member.broken.left = 0
        train_until_lost(member)

    settings = {"tau": None, "beta": 0.0, "gradients": "all"}
    members = lost((*kinds, "torch"), work, **settings)

    def then(member, reformed):
        began = member.values, member.optimizer.steps
        member.train(2)
        return *began, member.values

    found = again(members, then)
    begun = members[0].start - LR * 3 * GRADIENTS[:3].mean(axis=0)
    for began, steps, values in found:
        assert steps == 3
        np.testing.assert_allclose(began, begun, atol=1e-13)
        np.testing.assert_allclose(values, begun - LR * 2 * GRADIENTS[:2].mean(axis=0), atol=1e-13)
    assert np.array_equal(found[0][2], found[1][2])


@pytest.mark.filterwarnings("ignore:tau=None")
@pytest.mark.parametrize("kinds", ORDERS, ids="-".join)
@pytest.mark.parametrize("method", ["sgp", "osgp"])
@pytest.mark.thorough
def test_gossip_begins_anew_at_the_mean_of_the_survivors(method, kinds):
    def work(member):
        member.train(4)
        member.broken.left = 0
        train_until_lost(member)

    members = lost((*kinds, "torch"), work, tau=None, beta=0.0, gossip=METHODS[method])
    mean = np.mean([member.values for member in members], axis=0)

    def then(member, reformed):
        began = member.values, member.optimizer.steps
        member.train(5)
        member.join()
        return *began, member.values

    found = again(members, then)
    for began, steps, values in found:
        np.testing.assert_allclose(began, mean, atol=1e-13)
        assert steps == found[0][1]
        np.testing.assert_allclose(values, mean - LR * 5 * GRADIENTS[:2].mean(axis=0), atol=1e-13)


def test_without_the_elastic_launcher_a_keras_state_is_refused_on_all_workers():
    """A PyTorch worker starts in SlowMo's constructor, where the Keras worker's state would never come."""

    def work(comm):
        settings = {"tau": TAU, "beta": BETA}
        if comm.rank == 0:
            model = torch.nn.Linear(LENGTH, 1)
            inner = torch.optim.SGD(model.parameters(), lr=LR)
            slowmo_torch.SlowMo(
                inner, model, comm=TorchComm(comm), parameter_map=slowmo_torch.ParameterMap(), **settings
            )
            return
        model = keras.Sequential([keras.Input((LENGTH,)), keras.layers.Dense(1)])
        connection = GraphComm(comm)
        optimizer = slowmo_tf.SlowMo("sgd", comm=connection, parameter_map=slowmo_tf.ParameterMap(), **settings)
        model.compile(optimizer, "mse")
        slowmo_tf.elastic.run(lambda state: None)(slowmo_tf.elastic.State(model))

    with doubles():
        errors = ThreadWorld(2).run(work, return_exceptions=True)
    for error in errors:
        assert isinstance(error, ValueError)
        assert "needs the elastic launcher" in str(error)
