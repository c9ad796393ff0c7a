"""The pure parts of the core: schedule, layout, outer update, ledger."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_slowmo import SlowMoConfig
from hvd_slowmo.comm.protocol import ScopedComm, SoloComm
from hvd_slowmo.core.average.ledger import AVERAGE, TRAINING, Row, error_text, rates_warning, verdict
from hvd_slowmo.core.parts.layout import BLOCK, ParameterGroups, lay_out
from hvd_slowmo.core.parts.ops import EagerOps
from hvd_slowmo.core.parts.outer_update import Momentum, momentum, next_gamma, outer_update
from hvd_slowmo.core.parts.progress import Flight, Progress, PushSum
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.parts.schedule import next_fragment, step_plan, steps_to_meeting, workers_equal
from hvd_slowmo.core.step.machine import Machine
from hvd_slowmo.wire.tensors import TensorSpec
from hvd_slowmo.wire.views import View
from hvd_slowmo_torch.tensors.outer_update import outer_update_

OPS = EagerOps()


@dataclass(frozen=True)
class Ref:
    spec: TensorSpec
    device: str = "cpu"


@given(tau=st.integers(1, 7), warmup=st.integers(0, 6))
def test_the_schedule_is_warm_up_then_blocks_of_tau(tau, warmup):
    config = SlowMoConfig(tau=tau, warmup_steps=warmup)
    position = 0
    for step in range(40):
        now = step_plan(config, step)
        assert now.average_gradients == (step < warmup)
        assert bool(now.begin) == (warmup > 0 and step == warmup - 1)
        if step >= warmup:
            position += 1
        assert bool(now.outer) == (position == tau)
        position %= tau
        if step + 1 >= warmup:
            assert steps_to_meeting(config, step + 1) == config.tau - position


@pytest.mark.slow
@given(tau=st.integers(1, 7), warmup=st.integers(0, 6))
def test_a_step_without_an_event_is_only_counted(tau, warmup):
    """An adapter leaves out all else then: here store and workers are nothing, so any use of them would fail."""
    config = SlowMoConfig(tau=tau, warmup_steps=warmup)
    refs = [Ref(TensorSpec("p", "parameter", (2,), "float64", View.same((2,)), ""))]
    laid = lay_out(refs, ParameterGroups((0,), (0,)), 80).layout
    machine = Machine(Runtime(config, laid, OPS, store=None, comm=ScopedComm(SoloComm(), "slowmo")))
    progress = machine.initial()
    counted = 0
    for step in range(20):
        now = progress._replace(step=step)
        if machine.plan(now).eventful:
            continue
        counted += 1
        rates = np.array([0.1 + step])
        progress = machine.count(now, rates)
        whole = machine.after_inner_step(now, rates).flat()
        for field, value in progress.flat().items():
            np.testing.assert_array_equal(value, whole[field])
        assert (progress.step, *progress.since, *progress.rate_steps) == (step + 1, counted, counted)
    assert counted == sum(step >= warmup and (step + 1 - warmup) % tau != 0 for step in range(20))


def test_workers_are_equal_while_gradients_are_averaged_and_after_an_average():
    def equal(config, step, since, launched=()):
        nothing = np.zeros(0)
        flight = Flight(np.array(launched), nothing, nothing, nothing)
        mixing = PushSum(nothing, nothing, 0)
        return workers_equal(
            config, Progress(step, np.array(since), nothing, nothing, nothing, 0, nothing, mixing, flight)
        )

    assert equal(SlowMoConfig(tau=4), 8, [0])
    assert not equal(SlowMoConfig(tau=4), 9, [1])
    assert equal(SlowMoConfig(tau=4, warmup_steps=5), 5, [5])
    assert not equal(SlowMoConfig.sgp(tau=4, average=False), 8, [0])  # anchors and v differ
    assert equal(SlowMoConfig.sgp(), 8, [0])
    assert equal(SlowMoConfig.ar_sgd(), 7, [7])
    assert not equal(SlowMoConfig(tau=4, fragments=2), 8, [2, 0])
    assert not equal(SlowMoConfig(tau=4, delay=1), 8, [0], [8])


@pytest.mark.slow
@given(tau=st.integers(1, 9), data=st.data(), warmup=st.integers(0, 6))
def test_fragments_meet_and_land_at_their_steps(tau, data, warmup):
    fragments, delay = data.draw(st.integers(1, tau)), data.draw(st.integers(0, tau))
    config = SlowMoConfig(tau=tau, fragments=fragments, delay=delay, warmup_steps=warmup)
    offsets = [math.ceil((f + 1) * tau / fragments) % tau for f in range(fragments)]
    meets = {s: f for s in range(1, 60) for f in range(fragments) if s % tau == offsets[f]}
    for step in range(40):
        now, after = step_plan(config, step), step + 1 - warmup
        assert bool(now.outer) == (after in meets)
        if now.outer:
            assert now.fragment == meets[after]
        assert bool(now.lands) == (delay > 0 and after - delay in meets)
        if now.lands:
            assert now.landing == meets[after - delay]
        if step >= warmup:
            following = min(s for s in meets if s > step - warmup)
            assert steps_to_meeting(config, step) == following - (step - warmup)
            assert next_fragment(config, step) == meets[following]


@settings(max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=8),
    chunk_bytes=st.integers(1, 80),
)
def test_chunks_and_tiles_cover_every_element_once(sizes, chunk_bytes):
    refs = [
        Ref(TensorSpec(str(i), "parameter", (n,), "float64", View.same((n,)), "")) for i, (n, _) in enumerate(sizes)
    ]
    groups = ParameterGroups(tuple(group for _, group in sizes), (0, 1, 2))
    if not any(n for n, _ in sizes):
        with pytest.raises(ValueError, match="no parameter with an element"):
            lay_out(refs, groups, chunk_bytes)
        return
    laid = lay_out(refs, groups, chunk_bytes).layout
    owners = [(i, k) for i, (n, _) in enumerate(sizes) for k in range(n)]
    expected_groups = [group for n, group in sizes for _ in range(n)]
    seen, seen_groups = [], []
    for chunk in laid.chunks:
        assert 0 < chunk.size * 8 <= max(chunk_bytes, 8)
        at = 0
        for number, start, stop, place in laid.spans(chunk):
            assert place == at
            seen += [(number, k) for k in range(start, stop)]
            at += stop - start
        assert at == chunk.size
        tiles = list(chunk.tiles())
        assert [p.start for p in tiles] == [chunk.start, *(p.stop for p in tiles[:-1])]
        assert tiles[-1].stop == chunk.stop
        seen_groups += [p.group for p in tiles for _ in range(p.size)]
    assert seen == owners
    assert seen_groups == expected_groups


@given(size=st.integers(1, 3_000_000), fragments=st.integers(2, 16), longest=st.integers(1, 2**20))
def test_fragments_have_as_many_messages_and_long_ones_end_at_whole_blocks(size, fragments, longest):
    refs = [Ref(TensorSpec("p", "parameter", (size,), "float32", View.same((size,)), ""))]
    longest = max(longest, size // (50 * fragments) + 1)  # not thousands of messages
    laid = lay_out(refs, ParameterGroups((0,), (0,)), 4 * longest, fragments).layout
    chunks = laid.chunks
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == size
    assert all(0 < chunk.size <= longest for chunk in chunks)
    assert len(chunks) == size or len(chunks) % fragments == 0
    ends = [chunk.stop % BLOCK for chunk in chunks[:-1]]
    lengths = [chunk.size for chunk in chunks]
    if size >= 16 * BLOCK * len(chunks) and longest >= 16 * BLOCK:
        assert not any(ends)
        assert max(lengths) - min(lengths) < 2 * BLOCK
    else:
        assert max(lengths) - min(lengths) <= 1


def test_regrouping_changes_no_message():
    specs = [TensorSpec(name, "parameter", (5,), "float32", View.same((5,)), name) for name in "abc"]
    laid = lay_out([Ref(spec) for spec in specs], ParameterGroups.single(3), 24)
    regrouped = laid.regrouped(ParameterGroups((0, 1, 0), (0, 1)), specs)
    ends = [(chunk.start, chunk.stop) for chunk in laid.layout.chunks]
    assert [(chunk.start, chunk.stop) for chunk in regrouped.layout.chunks] == ends == [(0, 6), (6, 12), (12, 15)]
    tiles = [(tile.start, tile.stop, tile.group) for chunk in regrouped.layout.chunks for tile in chunk.tiles()]
    assert tiles == [(0, 5, 0), (5, 6, 1), (6, 10, 1), (10, 12, 0), (12, 15, 0)]
    assert regrouped.layout.group_count == 2


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


def row(step=12, reason=TRAINING, training=1, finite=1, weight=1.0, rate=1.2):
    return [*Row(step, reason, training, 0, finite, weight, 1, step, 12, 0, 0, 0.0, 0), rate]


GOOD = row()


def test_the_ledger_judges_every_worker_by_the_table():
    found = verdict(OPS, rows(GOOD, GOOD), "raise")
    assert not found.failed
    assert not found.rates_differ
    assert found.weight == 2
    assert found.gamma == pytest.approx([0.1])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (row(step=24), "not at the same step: rank 5 step 12, rank 7 step 24"),
        (row(reason=AVERAGE), "rank 7 is in averaged_parameters"),
        (row(finite=0), "not finite .* on rank 7 after step 12"),
        (row(rate=float("nan")), "learning rate on rank 7 .* group 0 is nan"),
        (row(rate=-1.0), "learning rate on rank 7 .* is -1.0"),
        (row(rate=float("inf")), "learning rate on rank 7 .* is inf"),
    ],
)
def test_the_ledger_names_the_rank_that_is_wrong(wrong, words):
    table = rows(GOOD, wrong)
    assert verdict(OPS, table, "raise").failed
    with pytest.raises(ValueError, match=words):
        OPS.error_if(True, table, error_text([5, 7], "slowmo"), None)


def test_rates_that_differ_are_averaged_and_warn_once(caplog):
    table = rows(GOOD, row(rate=2.4))
    found = verdict(OPS, table, "raise")
    assert not found.failed
    assert found.gamma == pytest.approx([0.15])
    ops = EagerOps()
    for _ in range(2):
        ops.warn("rates", found.rates_differ, table, rates_warning([0, 1], "slowmo"))
    assert [record.getMessage() for record in caplog.records if "rank 0: 0.1; rank 1: 0.2" in record.getMessage()]
    assert len(caplog.records) == 1
