"""Outer steps in few bits, on PyTorch: the reference bitwise, what is owed, resumes, joins and refusals."""

import copy
import time

import numpy as np
import pytest
import torch
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from hvd_slowmo_torch.tensors.codec import TorchCodec
from reference.few_bits import mean_of_differences
from support.few_bits import BITS, SHAPE, Weights, build, centre, entry, flat, step, trained
from support.trainings.pytorch import same

LATE = [{}, {"delay": 1}, {"fragments": 4, "delay": 2}, {"fragments": 4, "delay": 3}]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_an_outer_step_equals_the_reference_bitwise(bits, size):
    """tau = 1 and no momentum: the new anchor is the old one minus Delta. Uneven weights by a worker that is done."""

    def work(comm):
        model, optimizer = build(comm, tau=1, beta=0.0, bits=bits)
        seen = []
        for k in range(4):
            before = [
                flat(optimizer, "anchor"),
                flat(optimizer, "residual"),
                copy.deepcopy(entry(optimizer)["slices"]["slice_residual"]),
            ]
            sent = model.weight.detach().clone()
            rng = np.random.default_rng([comm.rank, k])
            gradient = torch.tensor(rng.normal(size=SHAPE), dtype=torch.float32)
            model.weight.grad, model.bias.grad = gradient, torch.ones(5)
            sent.add_(gradient, alpha=-0.125)  # as SGD does
            optimizer.step()
            after = [
                flat(optimizer, "anchor"),
                flat(optimizer, "residual"),
                copy.deepcopy(entry(optimizer)["slices"]["slice_residual"]),
            ]
            assert np.array_equal(model.weight.detach().numpy().reshape(-1), after[0])
            seen.append((before, sent.numpy().reshape(-1), copy.deepcopy(after)))
        return seen

    results = ThreadWorld(size).run(work)
    blocks = -(-int(np.prod(SHAPE)) // 1024)
    lengths = [1024 * (blocks * (j + 1) // size - blocks * j // size) for j in range(size)]
    for moment in zip(*results, strict=True):
        anchor = moment[0][0][0]
        s = [
            next(iter(before[2].values())).numpy() if before[2] else np.zeros(length, np.float32)
            for (before, _, _), length in zip(moment, lengths, strict=True)
        ]
        delta, owed, rests = mean_of_differences(
            anchor, [x for _, x, _ in moment], [before[1] for before, _, _ in moment], s, [1.0] * size, bits
        )
        for rank, (_, _, (new, e, slices)) in enumerate(moment):
            assert np.array_equal(new, anchor - delta)
            assert np.array_equal(e, owed[rank])
            assert np.array_equal(next(iter(slices.values())).numpy(), rests[rank])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("settings", LATE, ids=str)
@pytest.mark.slow
@pytest.mark.sample(every=4)
def test_all_workers_hold_the_same_after_a_join_and_are_near_to_more_bits(bits, settings):
    def work(comm, bits):
        model, optimizer = build(comm, bits=bits, **settings)
        for k in range(22 + 3 * comm.rank):
            step(model, optimizer, comm.rank, k)
            if not optimizer.worker.progress.flight.launched.any():
                anchors.setdefault((bits, k), []).append(flat(optimizer, "anchor"))
        optimizer.join()
        return copy.deepcopy(model.state_dict())

    anchors = {}
    few, whole = (ThreadWorld(3).run(lambda comm, b=b: work(comm, b)) for b in (bits, 16))
    assert all(same(model, few[0]) for model in few)
    apart = (few[0]["weight"] - whole[0]["weight"]).abs().max()
    assert apart <= {16: 0, 8: 0.05, 4: 0.4}[bits]
    assert all(np.array_equal(a, each[0]) for each in anchors.values() for a in each)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_constant_gradient_drives_the_parameters_to_the_same_place(bits):
    """The remainder of rounding is owed and comes later: the distance does not grow with the steps."""

    def work(comm, bits):
        model, optimizer = build(comm, bits=bits, beta=0.5)
        gradient = torch.tensor(np.random.default_rng(comm.rank).normal(size=SHAPE), dtype=torch.float32)
        places = []
        for _ in range(200):
            model.weight.grad, model.bias.grad = gradient, torch.zeros(5)
            optimizer.step()
            places.append(model.weight.detach().clone())
        return places[39::40]

    few, whole = (ThreadWorld(2).run(lambda comm, b=b: work(comm, b))[0] for b in (bits, 16))
    apart = [float((a - b).abs().max()) for a, b in zip(few, whole, strict=True)]
    assert max(apart) < {8: 0.2, 4: 3.0}[bits]
    assert apart[-1] < 2 * apart[0] + 0.05
    assert float((whole[-1] - whole[0]).abs().max()) > 50


@pytest.mark.parametrize("settings", LATE, ids=str)
@pytest.mark.parametrize("stop", [3, 4, 5, 6])
@pytest.mark.parametrize("kind", ["state_dict", "save"])
@pytest.mark.slow
@pytest.mark.sample(every=3)
def test_a_resume_is_bitwise_the_run_without_a_stop(settings, stop, kind, tmp_path):
    def work(comm):
        model, optimizer = build(comm, **settings)
        for k in range(14):
            if k == stop:
                state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                optimizer.save(tmp_path / "x.slowmo")
            step(model, optimizer, comm.rank, k)
        again, other = build(comm, **settings)
        if kind == "save":
            other.load(tmp_path / "x.slowmo")
        else:
            again.load_state_dict(state[0])
            other.load_state_dict(state[1])
        for k in range(stop, 14):
            step(again, other, comm.rank, k)
        mine, theirs = entry(optimizer), entry(other)
        keys = ("vectors", "slices", "in_flight", "progress")
        return same(model.state_dict(), again.state_dict()) and all(same(mine[key], theirs[key]) for key in keys)

    assert ThreadWorld(3).run(work) == [True] * 3


IN_FLIGHT = [
    {"delay": 1},
    {"delay": 2},
    {"fragments": 4, "delay": 2},
    {"fragments": 4, "delay": 3},
    {"fragments": 4, "delay": 4},
]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("settings", IN_FLIGHT, ids=str)
@pytest.mark.parametrize("lengths", [(0, 5), (1, 6), (2, 9), (3, 3)], ids=str)
@pytest.mark.parametrize("chunk_bytes", [None, 5000], ids=["one chunk", "several chunks"])
@pytest.mark.slow
@pytest.mark.sample(every=5)
def test_workers_in_a_join_and_in_training_start_the_same_in_the_same_order(
    monkeypatch, bits, settings, lengths, chunk_bytes
):
    """Right after a resume too: a ThreadWorld refuses the first difference."""
    if chunk_bytes:
        monkeypatch.setattr(SlowMo, "_chunk_bytes", chunk_bytes)

    def work(comm, resumes):
        model, optimizer = build(comm, bits=bits, **settings)
        for k in range(7):
            step(model, optimizer, comm.rank, k)
        if resumes:
            state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model, optimizer = build(comm, bits=bits, **settings)
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        for k in range(7, 7 + lengths[comm.rank]):
            step(model, optimizer, comm.rank, k)
        optimizer.join()
        return copy.deepcopy(model.state_dict())

    whole, again = (ThreadWorld(2).run(lambda comm, r=r: work(comm, r)) for r in (False, True))
    assert same(whole[0], whole[1])
    assert same(whole, again)


def test_another_number_of_workers_owes_as_much(tmp_path):
    def save(comm):
        model, optimizer = build(comm)
        for k in range(10):
            step(model, optimizer, comm.rank, k)
        optimizer.join()
        optimizer.save(tmp_path / "x.slowmo")
        return flat(optimizer, "residual")

    def load(comm):
        _, optimizer = build(comm)
        optimizer.load(tmp_path / "x.slowmo")
        return flat(optimizer, "residual"), dict(entry(optimizer)["slices"]["slice_residual"])

    owed = ThreadWorld(2).run(save)
    for residual, slices in ThreadWorld(3).run(load):
        np.testing.assert_allclose(residual, (owed[0] + owed[1]) / 2, rtol=1e-6)
        assert slices
        assert not any(bool(residual.any()) for residual in slices.values())


def test_a_join_and_averaged_parameters_leave_what_is_owed_alone():
    def work(comm):
        model, optimizer = build(comm)
        for k in range(6):
            step(model, optimizer, comm.rank, k)
        before = flat(optimizer, "residual")
        with optimizer.averaged_parameters():
            pass
        optimizer.join()
        return np.array_equal(before, flat(optimizer, "residual")), bool(before.any())

    assert ThreadWorld(2).run(work) == [(True, True)] * 2


def test_a_state_in_few_bits_is_each_ranks_own():
    def work(comm):
        model, optimizer = build(comm)
        for k in range(4):
            step(model, optimizer, comm.rank, k)
        optimizer.join()
        return entry(optimizer)["common"]

    assert ThreadWorld(2).run(work) == [False, False]


def test_an_excluded_worker_owes_nothing():
    def work(comm):
        model, optimizer = build(comm, nonfinite="exclude")
        for k in range(8):
            step(model, optimizer, comm.rank, k)
            if k == 5 and comm.rank == 1:
                with torch.no_grad():
                    model.weight[0, 0] = float("nan")
        return copy.deepcopy(model.state_dict()), flat(optimizer, "residual")

    (a, owed), (b, nothing), _ = ThreadWorld(3).run(work)
    assert same(a, b)
    assert owed.any()
    assert not nothing.any()


def test_fewer_bytes_are_sent():
    def work(comm, bits):
        model, optimizer = build(comm, bits=bits)
        start = optimizer.bytes_sent
        for k in range(4):
            step(model, optimizer, comm.rank, k)
        return optimizer.bytes_sent - start

    whole, eight, four = (sum(ThreadWorld(2).run(lambda comm, b=b: work(comm, b))) for b in (32, 8, 4))
    assert whole / eight > 3  # the bias travels whole
    assert whole / four > 5


@pytest.mark.workers
@pytest.mark.both_transports
@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 4, "fragments": 4, "delay": 2}], ids=str)
@pytest.mark.slow
def test_real_workers_compute_what_threads_do(workers, settings):
    found = workers(2).run("support.few_bits:trained", settings=settings)
    expected = ThreadWorld(2).run(lambda comm: trained(settings, comm))
    for mine, other in zip(found, expected, strict=True):
        assert np.array_equal(mine["weight"], other["weight"])


@pytest.mark.parametrize("settings", [{"delay": 2}, {"fragments": 4, "delay": 3}], ids=str)
@pytest.mark.slow
def test_a_load_right_after_a_launch_leaves_the_exchange_its_values(settings, monkeypatch):
    """The exchange, which nobody needs any more, encodes in its thread what the load has replaced."""
    encode = TorchCodec.encode

    def slow(codec, *arguments):
        time.sleep(0.02)
        return encode(codec, *arguments)

    monkeypatch.setattr(TorchCodec, "encode", slow)

    def work(comm):
        model, optimizer = build(comm, **settings)
        for k in range(3):
            step(model, optimizer, comm.rank, k)
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        ends = []
        for _ in range(2):
            for k in range(3, 10):
                step(model, optimizer, comm.rank, k)
            ends.append(copy.deepcopy(model.state_dict()))
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        optimizer.join()
        return same(*ends)

    assert ThreadWorld(2).run(work) == [True, True]


def test_a_group_of_biases_is_added_beside_a_matrix():
    """They travel in segments of their own, which must not take each other's vectors."""

    def work(comm):
        model = Weights()
        optimizer = SlowMo(torch.optim.SGD([model.weight], lr=0.1), model, SlowMoConfig(tau=2, bits=8), comm=comm)
        optimizer.add_param_group({"params": [model.bias]})
        vectors = entry(optimizer)["vectors"]["anchor"]
        return [same(a, p.detach().reshape(-1)) for a, p in zip(vectors, model.parameters(), strict=True)]

    assert ThreadWorld(2).run(work) == [[True, True]] * 2


@pytest.mark.parametrize("chunk_bytes", [None, 12000], ids=["one chunk", "several chunks"])
@pytest.mark.parametrize("delay", [0, 2])
def test_a_group_is_added_and_nothing_that_is_owed_is_lost(monkeypatch, chunk_bytes, delay):
    """The slices of a longer vector end elsewhere, so that values of a residual belong to other workers."""
    if chunk_bytes:
        monkeypatch.setattr(SlowMo, "_chunk_bytes", chunk_bytes)
    size, length = 3, int(np.prod(SHAPE))

    class Two(Weights):
        def __init__(self):
            super().__init__()
            self.added = nn.Parameter(torch.ones(60, 80))

    def work(comm):
        model = Two()
        inner = torch.optim.SGD([model.weight, model.bias], lr=0.125)
        optimizer = SlowMo(inner, model, SlowMoConfig(tau=4, bits=4, delay=delay), comm=comm)
        for k in range(10):
            model.zero_grad()
            model.weight.grad = model.weight.detach() - centre(comm.rank, k, SHAPE)
            optimizer.step()
        before = copy.deepcopy(entry(optimizer))
        optimizer.add_param_group({"params": [model.added], "lr": 0.125})
        after = copy.deepcopy(entry(optimizer))
        for k in range(10, 20):
            step(model, optimizer, comm.rank, k)
        optimizer.join()
        return before, after, copy.deepcopy(model.state_dict())

    results = ThreadWorld(size).run(work)
    assert all(same(model, results[0][2]) for _, _, model in results)
    # The workers' slices of a chunk, end to end, are the chunk and what fills up its last block.
    was, now = ([result[part]["slices"]["slice_residual"] for result in results] for part in (0, 1))
    per_chunk = (chunk_bytes or 4 * 2**22) // 4

    def whole(slices, length):
        found = []
        for number, start in enumerate(range(0, length, per_chunk)):
            joined = torch.cat([each[number] for each in slices])
            found.append(joined[: min(per_chunk, length - start)])
        return torch.cat(found)

    owed = whole(was, length)
    assert owed.any()
    assert torch.equal(whole(now, length + 4800)[:length], owed)
    assert not whole(now, length + 4800)[length:].any()
    for before, after, _ in results:
        for name in ("anchor", "v", "residual"):
            assert torch.equal(after["vectors"][name][0][:length], before["vectors"][name][0])
            assert bool((after["vectors"][name][0][length:] == (name == "anchor")).all())


def test_a_group_added_after_a_load_in_flight_awaits_what_the_load_has_dropped():
    """Until then its names are taken, which Horovod would refuse."""

    def work(comm):
        model = Weights()
        inner = torch.optim.SGD([model.weight], lr=0.125)
        optimizer = SlowMo(inner, model, SlowMoConfig(tau=2, bits=8, delay=1), comm=comm)
        begun = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        for k in range(2):
            model.weight.grad = model.weight.detach() - centre(comm.rank, k, SHAPE)
            optimizer.step()
        model.load_state_dict(begun[0])
        optimizer.load_state_dict(begun[1])
        flights = optimizer.worker.assembly.machine.flights
        before = flights.in_flight
        optimizer.add_param_group({"params": [model.bias]})
        after = flights.in_flight
        for k in range(6):
            step(model, optimizer, comm.rank, k)
        optimizer.join()
        return before, after, copy.deepcopy(model.state_dict())

    one, other = ThreadWorld(2).run(work)
    assert one[:2] == other[:2] == (True, False)
    assert same(one[2], other[2])
