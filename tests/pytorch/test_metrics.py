"""metrics() equals the same quantities computed from the workers' parameters."""

import numpy as np
import pytest
import torch

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo
from support import few_bits
from support.problems import Problem, config_of
from support.trainings.pytorch import BASES, Model, advance

PROBLEM = Problem({"tau": 3, "alpha": 0.8}, steps=12)


def work(comm, problem=PROBLEM, metrics=True):
    model = Model(problem.start())
    base = BASES[problem.base](model.parameters(), lr=0.1)
    optimizer = SlowMo(base, model, config_of(problem.config), comm=comm, metrics=metrics)
    seen, before, held = [], [], []
    for step in range(problem.steps):
        if step % 3 == 2:  # the inner step that ends the block, as SlowMo sees it
            rate = problem.rate(step, 0)
            before.append(model.flat() - rate * problem.gradient(comm.rank, step, model.flat()))
        held += advance(problem, model, optimizer, comm.rank, range(step, step + 1))
        seen.append(optimizer.metrics())
    return seen, before, held


def test_metrics_are_those_of_the_workers_parameters():
    results = ThreadWorld(3).run(work)
    assert results[0][0][:2] == [None, None]
    anchor, v = PROBLEM.start(), np.zeros(15)
    divergence = 0.0
    for block in range(4):
        ends = np.array([before[block] for _, before, _ in results])
        mean = ends.mean(axis=0)
        delta = anchor - mean
        for seen, _, _ in results:
            found = seen[3 * block + 2]
            assert found.step == 3 * block + 3
            assert found.delta_norm == pytest.approx(np.linalg.norm(delta))
            assert found.v_norm == pytest.approx(np.linalg.norm(v))
            norms = np.linalg.norm(delta) * np.linalg.norm(v)
            assert found.cosine == pytest.approx(delta @ v / norms if norms else 0.0)
            assert found.divergence == pytest.approx(divergence)  # of the previous block
            assert found.bytes_sent == 8 * 15 + (3 * 15 + 4) * 8 + (8 * 15 if block == 0 else 0)
            assert found.seconds_waited >= 0
        divergence = ((ends - mean) ** 2).sum(axis=1).mean() / (mean @ mean)
        held = results[0][2][3 * block + 2]
        anchor, v = held["anchor"], held["v"]


def test_measuring_changes_nothing_of_the_training():
    problem = PROBLEM
    measured = ThreadWorld(2).run(lambda comm: work(comm)[2])

    def plain(comm):
        model = Model(problem.start())
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = SlowMo(base, model, config_of(problem.config), comm=comm)
        with pytest.raises(RuntimeError, match="metrics=True"):
            optimizer.metrics()
        return advance(problem, model, optimizer, comm.rank, range(problem.steps))

    for a, b in zip(measured, ThreadWorld(2).run(plain), strict=True):
        for one, other in zip(a, b, strict=True):
            assert all(np.array_equal(one[key], other[key]) for key in one)


def test_local_sgd_has_a_divergence_and_no_momentum():
    results = ThreadWorld(2).run(lambda comm: work(comm, Problem({"tau": 3, "alpha": 1.0, "beta": 0.0}, steps=6)))
    last = results[0][0][-1]
    assert last.divergence > 0
    assert (last.delta_norm, last.v_norm, last.cosine) == (0.0, 0.0, 0.0)


def test_without_the_average_they_are_the_workers_own():
    config = {"tau": 3, "beta": 0.5, "gossip": "sgp", "average": False}
    results = ThreadWorld(3).run(lambda comm: work(comm, Problem(config, steps=6)))
    for seen, _, held in results:
        first, second = seen[2], seen[5]
        assert first.delta_norm == pytest.approx(np.linalg.norm(held[2]["v"]))  # v' = Delta in the first block
        assert (first.v_norm, first.divergence) == (0.0, 0.0)
        assert second.v_norm == pytest.approx(first.delta_norm)
        assert 0 < abs(second.cosine) <= 1
    assert results[0][0][2].delta_norm != results[1][0][2].delta_norm


def test_what_is_owed_and_trained_meanwhile_is_measured():
    """With few bits and a delay, relative to Delta; each worker has its own."""

    def work(comm):
        model, optimizer = few_bits.build(comm, tau=4, delay=2, bits=4, metrics=True)
        seen = []
        for k in range(14):
            sent = few_bits.entry(optimizer)["in_flight"]
            before = model.weight.detach().clone()
            owed = few_bits.flat(optimizer, "residual")
            anchor = few_bits.flat(optimizer, "anchor")
            few_bits.step(model, optimizer, comm.rank, k)
            if k in (5, 9, 13):
                trained = before - 0.125 * (before - few_bits.centre(comm.rank, k, before.shape))
                seen.append((optimizer.metrics(), anchor, owed, trained, sent[0]))
        return seen

    for first, second in zip(*ThreadWorld(2).run(work), strict=True):
        for metrics, _, owed, trained, sent in (first, second):
            local = np.linalg.norm(trained.numpy().reshape(-1) - sent.numpy())
            assert metrics.local * metrics.delta_norm == pytest.approx(local, rel=0.05)  # the bias is in there too
            assert metrics.residual * metrics.delta_norm == pytest.approx(np.linalg.norm(owed), rel=1e-4)
            assert 0 <= metrics.hidden <= 1
        assert first[0].delta_norm == second[0].delta_norm
        assert first[0].local != second[0].local


@pytest.mark.parametrize(
    ("settings", "near"),
    [({"bits": 32}, 1e-6), ({"bits": 32, "delay": 1}, 1e-6), ({"bits": 8, "delay": 2}, 0.05)],
    ids=str,
)
@pytest.mark.parametrize("workers", [2, 3])
def test_a_divided_outer_state_is_measured_slice_by_slice(workers, settings, near):
    """Together the workers' slices are the whole; with few bits but for what is rounded, and for the biases."""

    def work(comm, shard):
        model, optimizer = few_bits.build(comm, tau=4, metrics=True, shard=shard, **settings)
        seen, means = [], 0.0
        for k in range(8 + settings.get("delay", 0)):
            few_bits.step(model, optimizer, comm.rank, k)
            if k == 3 + settings.get("delay", 0):
                seen.append(optimizer.metrics())
                means = slice_of(optimizer) if shard else 0.0  # without momentum the new anchor is the mean
        return [*seen, optimizer.metrics()], means

    divided, whole = (ThreadWorld(workers).run(lambda comm, s=shard: work(comm, s)) for shard in (True, False))
    for place in (0, 1):
        parts, all_of_it = [seen[place] for seen, _ in divided], whole[0][0][place]
        assert sum(part.delta_norm**2 for part in parts) == pytest.approx(all_of_it.delta_norm**2, rel=near)
        assert sum(part.v_norm**2 for part in parts) == pytest.approx(all_of_it.v_norm**2, rel=near)
        product = sum(part.cosine * part.delta_norm * part.v_norm for part in parts)
        assert product == pytest.approx(all_of_it.cosine * all_of_it.delta_norm * all_of_it.v_norm, rel=near)
    means = np.array([mean for _, mean in divided])
    divergence = sum(mean * seen[0].divergence for seen, mean in divided) / means.sum()
    assert divergence == pytest.approx(whole[0][0][1].divergence, rel=near)  # which is known an outer step later there


def slice_of(optimizer):
    """Return the squared norm of this worker's slice of the anchor."""
    runtime = optimizer.worker.assembly.runtime
    total = 0.0
    for chunk in runtime.slices.chunks:
        part = runtime.slices.part(chunk)
        if part is not None:
            sliced = runtime.slices.keeps("anchor", chunk.index)
            values = runtime.store.read_slice("anchor", chunk.index) if sliced else runtime.store.read("anchor", part)
            total += float((values[: part.size].double() ** 2).sum())
    return total
