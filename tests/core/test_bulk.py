"""Tensors that one worker hands out beside the chunks: bitwise, in pieces, with errors on every worker."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import hvd_slowmo.tf
import hvd_slowmo.torch
from hvd_slowmo.comm import gathering
from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.core.start import bulk
from hvd_slowmo.core.start.bulk import Gift, Parcel, WholeArray, give
from support.trainings.keras import GraphComm

ODD = np.array([-0.0, np.nan, np.inf, 1e-45, -1e-45], np.float32)
ODD.view(np.uint32)[1] = 0xFFC12345  # a NaN with a payload, which a sum of floats would lose


class ArrayCarrier:
    """`Carrier` of NumPy arrays; it notes the sizes of the sums."""

    def __init__(self):
        self.sums = []

    def sum_words(self, comm, name, words):
        self.sums.append((name, words.nbytes))
        return comm.wait(comm.start_sum(name, words))

    def body(self, item):
        return in_place(item) if isinstance(item, np.ndarray) else None

    def new(self, dtype, shape):
        return np.full(shape, 77, dtype)


class Recorded:
    """Another Comm that notes the bytes of each item gathered."""

    def __init__(self, comm):
        self._comm = comm
        self.rank, self.size, self.ranks, self.node = comm.rank, comm.size, comm.ranks, None
        self.start_sum, self.wait = comm.start_sum, comm.wait
        self.gathered = []

    def gather(self, name, item):
        self.gathered.append(len(item))
        return self._comm.gather(name, item)


def in_place(array):
    return WholeArray(array.dtype, array.shape, lambda: array, lambda values: np.copyto(array, values))


def arrays(rank):
    """Return arrays with values on rank 0 and others' own on the other ranks."""
    random = np.random.default_rng(rank)
    found = {
        "odd": np.tile(ODD, 300),
        "flags": random.integers(0, 2, (41, 31)).astype(bool),
        "counts": random.integers(-(2**62), 2**62, (11, 13)),
        "halves": random.normal(size=(7, 9, 11)).astype(np.float16),
        "zeros": np.zeros((50, 50), np.float32),
        "minus": np.full((20, 20), -0.0),
        "scalar": np.array(3.5, np.float32),
        "empty": np.empty((0, 3), np.int8),
        "bytes": random.integers(0, 256, 1027).astype(np.uint8),
    }
    return found if rank == 0 else {key: random.integers(1, 100, x.shape).astype(x.dtype) for key, x in found.items()}


@pytest.mark.parametrize("piece", [16, 1000, bulk.PIECE_BYTES])
def test_tensors_of_all_types_arrive_bitwise(monkeypatch, piece):
    monkeypatch.setattr(bulk, "PIECE_BYTES", piece)
    giver, order = 1, [1, 0, 2]  # the giver need not be rank 0

    def work(comm):
        own, carrier = arrays(order[comm.rank]), ArrayCarrier()
        shared = np.arange(400.0)
        gift = Gift({key: in_place(x) for key, x in own.items()}, lambda: {"a": [shared, (shared, "x")], 3: ODD})
        (values,) = give(ScopedComm(comm, "s"), "start", [Parcel(giver, lambda: gift)], carrier)
        assert {name for name, _ in carrier.sums} == {"start.bytes"}
        assert max(size for _, size in carrier.sums) <= piece
        return own, values

    results = ThreadWorld(3).run(work)
    expected = arrays(0)
    for rank, (own, values) in enumerate(results):
        for key, x in own.items():
            assert (x.dtype, x.shape) == (expected[key].dtype, expected[key].shape)
            assert x.tobytes() == expected[key].tobytes(), key
        if rank == giver:
            assert values is None
            continue
        assert values["a"][1][0] is values["a"][0]  # one tensor in two places stays one
        assert values["a"][1][1] == "x"
        np.testing.assert_array_equal(values["a"][0], np.arange(400.0))
        assert values[3].tobytes() == ODD.tobytes()


def test_zeros_do_not_travel_and_nothing_large_is_gathered():
    def work(comm):
        recorded, carrier = Recorded(comm), ArrayCarrier()
        value = 1.0 - comm.rank  # zeros on rank 1, to be overwritten
        own = {"zeros": np.full(10**6, comm.rank), "ones": np.full(10**5, value), "small": np.full(9, value)}
        gift = Gift({key: in_place(x) for key, x in own.items()}, lambda: np.zeros((1000, 1000)))
        (values,) = give(ScopedComm(recorded, "s"), "start", [Parcel(0, lambda: gift)], carrier)
        assert max(recorded.gathered) < 4 * 1024
        assert sum(size for _, size in carrier.sums) == 8 * 10**5
        assert (own["zeros"] == 0).all()
        assert (own["ones"] == 1).all()
        assert (own["small"] == 1).all()
        assert comm.rank == 0 or (values.shape == (1000, 1000) and not values.any())

    ThreadWorld(2).run(work)


def test_several_parcels_and_workers_that_look_on():
    def work(comm):
        mine = comm.rank % 2
        own = [np.full(300, 1.0 + comm.rank), np.full(300, 1.0 + comm.rank)]
        parcels = [Parcel(0, lambda: Gift({"all": in_place(own[0])}))]
        parcels += [
            Parcel(giver, (lambda: Gift({"own": in_place(own[1])}, lambda: comm.rank)) if giver == mine else None)
            for giver in (0, 1)
        ]
        values = give(ScopedComm(comm, "s"), "start", parcels, ArrayCarrier())
        return own[0][0], own[1][-1], values

    assert ThreadWorld(4).run(work) == [
        (1.0, 1.0, [None, None, None]),
        (1.0, 2.0, [None, None, None]),
        (1.0, 1.0, [None, 0, None]),
        (1.0, 2.0, [None, None, 1]),
    ]


def outcomes(make, size=3):
    """Return the errors of a hand-out, which every worker must raise."""

    def work(comm):
        give(ScopedComm(comm, "s"), "start", [Parcel(0, lambda: make(comm.rank))], ArrayCarrier())

    found = ThreadWorld(size).run(work, return_exceptions=True)
    assert all(isinstance(each, Exception) for each in found)
    return [(type(each), str(each)) for each in found]


@pytest.mark.parametrize("at_fault", [0, 1])
def test_a_worker_that_cannot_give_or_take_is_an_error_on_every_worker(at_fault):
    def make(rank):
        if rank == at_fault:
            raise KeyError("lost")
        return Gift()

    assert outcomes(make) == [(ValueError, f"s: rank {at_fault}: KeyError: 'lost'")] * 3


def test_values_that_cannot_be_pickled_are_an_error_on_every_worker():
    found = outcomes(lambda rank: Gift(values=lambda: lambda: None))
    assert all("pickle" in text for _, text in found)
    assert found[1][0] is ValueError


def test_tensors_that_differ_are_an_error_on_every_worker():
    def make(rank):
        return Gift({"a": in_place(np.ones(2)), "b": in_place(np.ones((2, 3 + (rank == 1))))})

    others = "s: rank 1 differs from rank 0 in the tensors that are not trained; the error of that rank says in which."
    assert outcomes(make) == [
        (ValueError, others),
        (
            ValueError,
            "s: rank 1 differs from rank 0: of the tensors that are not trained it has b (float64, shape (2, 4)) where "
            "b (float64, shape (2, 3)) is expected.",
        ),
        (ValueError, others),
    ]
    found = outcomes(lambda rank: Gift({str(n): in_place(np.ones(2)) for n in range(2 + rank)}), size=2)
    assert "it has 3 tensors that are not trained where 2 are expected" in found[1][1]


def test_what_is_too_large_to_gather_raises_everywhere_with_its_size(monkeypatch):
    monkeypatch.setattr(gathering, "LARGEST", 2**20)

    def work(comm):
        scoped = ScopedComm(comm, "s")
        with pytest.raises(ValueError, match=r"s.logs: rank 1 has 7\.6 MiB to gather, and 1\.0 MiB is the most with 2"):
            scoped.gather("logs", np.zeros(10**6) if comm.rank else None)
        return scoped.gather("logs", [comm.rank])  # the job can go on

    assert ThreadWorld(2).run(work) == [[[0], [1]]] * 2


@pytest.mark.slow
def test_the_sum_of_all_items_is_bounded_too():
    def gather(name, item):
        return [item] * 1024

    with pytest.raises(ValueError, match=r"rank 0 has 1\.9 MiB to gather, and 1\.0 MiB is the most with 1024 workers"):
        gathering.bounded_gather(gather, range(1024), "x", bytes(2 * 10**6))
    assert len(gathering.bounded_gather(gather, range(1024), "x", bytes(10**6))) == 1024


def torch_start(comm):
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 300).requires_grad_(False))
    with torch.no_grad():
        model[1].weight.fill_(1.0 + comm.rank)
    inner = torch.optim.Adam(model[0].parameters())
    if comm.rank == 0:
        model(torch.ones(300)).sum().backward()
        inner.step()
    hvd_slowmo.torch.SlowMo(inner, model, comm=comm)
    return model[1].weight[0, 0].item(), inner.state[model[0].weight]["exp_avg"].numpy().copy()


def keras_start(comm):
    model = keras.Sequential([keras.Input((300,)), keras.layers.Dense(300), keras.layers.Dense(300, trainable=False)])
    model.layers[1].kernel.assign(tf.fill([300, 300], 1.0 + comm.rank))
    inner = keras.optimizers.Adam()
    inner.build(model.trainable_variables)
    moment = inner.variables[2]
    moment.assign(tf.fill(moment.shape, 2.0 - comm.rank))
    hvd_slowmo.tf.SlowMo(inner, comm=GraphComm(comm)).broadcast(model)
    return model.layers[1].kernel.numpy()[0, 0], moment.numpy()


@pytest.mark.parametrize("start", [torch_start, keras_start])
def test_a_start_gathers_nothing_of_a_tensors_size(start):
    """Frozen parameters of 360 kB and Adam's moments, which rank 0 alone has."""

    def work(comm):
        recorded = Recorded(comm)
        return start(recorded), max(recorded.gathered)

    (first, gathered), (second, _) = ThreadWorld(2).run(work)
    assert gathered < 16 * 1024
    assert first[0] == second[0] == 1.0
    np.testing.assert_array_equal(first[1], second[1])
    assert first[1].any()
