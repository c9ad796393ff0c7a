"""The core's pure parts: schedule, layout, outer update, ledger."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hvd_slowmo.layout
from hvd_slowmo import SlowMoConfig
from hvd_slowmo.layout import Entry, Segment, layout
from hvd_slowmo.ledger import AVERAGE, TRAINING, Row, complaint, oddity, verdict
from hvd_slowmo.ops import EagerOps
from hvd_slowmo.outer import Momentum, momentum, next_gamma, outer_update
from hvd_slowmo.schedule import plan, steps_to_meeting, workers_equal
from hvd_slowmo_torch.fast import outer_update_

OPS = EagerOps()


@given(tau=st.integers(1, 7), warmup=st.integers(0, 6))
def test_the_schedule_is_warm_up_then_blocks_of_tau(tau, warmup):
    config = SlowMoConfig(tau=tau, warmup_steps=warmup)
    position = 0
    for step in range(40):
        now = plan(config, step)
        assert now.average_gradients == (step < warmup)
        assert bool(now.begin) == (warmup > 0 and step == warmup - 1)
        if step >= warmup:
            position += 1
        assert bool(now.outer) == (position == tau)
        position %= tau
        if step + 1 >= warmup:
            assert steps_to_meeting(config, step + 1) == config.tau - position


def test_workers_are_equal_while_gradients_are_averaged_and_after_an_average():
    assert workers_equal(SlowMoConfig(tau=4), 8, 0)
    assert not workers_equal(SlowMoConfig(tau=4), 9, 1)
    assert workers_equal(SlowMoConfig(tau=4, warmup_steps=5), 5, 5)
    assert not workers_equal(SlowMoConfig.sgp(tau=4, average=False), 8, 0)  # anchors and v differ
    assert workers_equal(SlowMoConfig.sgp(), 8, 0)
    assert workers_equal(SlowMoConfig.ar_sgd(), 7, 7)


@settings(max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=8),
    chunk_bytes=st.integers(1, 80),
)
def test_chunks_and_pieces_cover_every_element_once(sizes, chunk_bytes):
    entries = tuple(Entry(str(i), (n,), "float64", group) for i, (n, group) in enumerate(sizes))
    segment = Segment("slow", "float64", 8, "cpu", entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hvd_slowmo.layout, "CHUNK_BYTES", chunk_bytes)
        laid = layout([segment], 3)
    owners = [(i, k) for i, (n, _) in enumerate(sizes) for k in range(n)]
    groups = [group for n, group in sizes for _ in range(n)]
    seen, seen_groups = [], []
    for chunk in laid.chunks:
        assert 0 < chunk.size * 8 <= max(chunk_bytes, 8)
        at = 0
        for number, start, stop, place in laid.spans(chunk):
            assert place == at
            seen += [(number, k) for k in range(start, stop)]
            at += stop - start
        assert at == chunk.size
        assert [p.start for p in chunk.pieces] == [chunk.start, *(p.stop for p in chunk.pieces[:-1])]
        assert chunk.pieces[-1].stop == chunk.stop
        seen_groups += [p.group for p in chunk.pieces for _ in range(p.size)]
    assert seen == owners
    assert seen_groups == groups


@pytest.mark.parametrize("nesterov", [False, True])
def test_at_constant_rate_the_outer_update_is_torch_sgd_on_the_outer_gradient(nesterov):
    """The independent oracle of algorithm.md: SGD(lr=alpha, momentum=beta) on Delta."""
    rng = np.random.default_rng(0)
    config = SlowMoConfig(alpha=0.7, beta=0.6, nesterov=nesterov)
    anchor, v = rng.normal(size=9), np.zeros(9)
    theirs = torch.nn.Parameter(torch.tensor(anchor))
    sgd = torch.optim.SGD([theirs], lr=0.7, momentum=0.6, nesterov=nesterov)
    for block in range(8):
        mean = anchor - rng.normal(size=9)
        theirs.grad = torch.tensor(anchor - mean)
        sgd.step()
        m = momentum(config, OPS, np.float64(0.1), np.float64(0.1 if block else 0.0))
        anchor, v = outer_update(config, mean, anchor, v, m)
        np.testing.assert_allclose(anchor, theirs.detach().numpy(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_alpha_1_beta_0_gives_the_mean_to_the_bit(kind):
    rng = np.random.default_rng(1)
    config = SlowMoConfig(alpha=1.0, beta=0.0)
    mean, anchor = kind(rng.normal(size=1000)), kind(rng.normal(size=1000) * 1e3)
    moved, _ = outer_update(config, mean, anchor, None, momentum(config, OPS, np.float64(1), np.float64(1)))
    assert bool((moved == mean).all())


@settings(max_examples=50)
@given(
    alpha=st.sampled_from([0.5, 1.0, 1.2]),
    beta=st.sampled_from([0.0, 0.4, 0.9]),
    nesterov=st.booleans(),
    gammas=st.sampled_from([(0.1, 0.0), (0.1, 0.2), (0.0, 0.2)]),
)
def test_the_update_in_place_is_the_pure_one(alpha, beta, nesterov, gammas):
    config = SlowMoConfig(alpha=alpha, beta=beta, nesterov=nesterov and beta > 0)
    generator = torch.Generator().manual_seed(0)
    mean, anchor, v = (torch.randn(100, dtype=torch.float64, generator=generator) for _ in range(3))
    m = Momentum(*map(float, momentum(config, OPS, *map(np.float64, gammas))))
    expected = outer_update(config, mean, anchor, v if beta else None, m)
    found = outer_update_(config, mean.clone(), anchor.clone(), v.clone() if beta else None, m)
    for a, b in zip(expected, found, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=4e-15)  # a fused multiply-add rounds once


def test_a_block_without_a_rate_keeps_v_and_the_rate_before():
    config = SlowMoConfig()
    m = momentum(config, OPS, np.array([0.0, 0.2]), np.array([0.4, 0.4]))
    assert m.carried.tolist() == [0.0, 0.25]
    assert m.keep.tolist() == [1.0, 0.25]
    assert m.gain.tolist() == [0.0, 1.0]
    assert next_gamma(OPS, np.array([0.0, 0.2]), np.array([0.4, 0.4])).tolist() == [0.4, 0.2]


def rows(*workers):
    return np.array(workers, dtype=np.float64)


def row(step=12, purpose=TRAINING, live=1, finite=1, share=1.0, rate=1.2):
    return [*Row(step, purpose, live, 0, finite, share, 1, step, 12, 0.0), rate]


GOOD = row()


def test_the_ledger_judges_every_worker_by_the_table():
    found = verdict(OPS, rows(GOOD, GOOD), "raise")
    assert not found.bad
    assert not found.odd
    assert found.weight == 2
    assert found.gamma == pytest.approx([0.1])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (row(step=24), "not at the same step: rank 5 step 12, rank 7 step 24"),
        (row(purpose=AVERAGE), "rank 7 is in averaged_parameters"),
        (row(finite=0), "not finite .* on rank 7 after step 12"),
        (row(rate=float("nan")), "learning rate on rank 7 .* group 0 is nan"),
        (row(rate=-1.0), "learning rate on rank 7 .* is -1.0"),
        (row(rate=float("inf")), "learning rate on rank 7 .* is inf"),
    ],
)
def test_the_ledger_names_the_rank_that_is_wrong(wrong, words):
    table = rows(GOOD, wrong)
    assert verdict(OPS, table, "raise").bad
    with pytest.raises(ValueError, match=words):
        OPS.refuse(True, table, complaint([5, 7], "slowmo"), None)


def test_rates_that_differ_are_averaged_and_warn_once(caplog):
    table = rows(GOOD, row(rate=2.4))
    found = verdict(OPS, table, "raise")
    assert not found.bad
    assert found.gamma == pytest.approx([0.15])
    ops = EagerOps()
    for _ in range(2):
        ops.warn("rates", found.odd, table, oddity([0, 1], "slowmo"))
    assert [record.getMessage() for record in caplog.records if "rank 0: 0.1; rank 1: 0.2" in record.getMessage()]
    assert len(caplog.records) == 1
