"""Compare the gossip oracle with values by hand, a simulation message by message, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_slowmo.topology.checks import topology
from reference.gossip import run_gossip, walk_gossip
from support.gossip_quadratics import Array, D, Gradient, Rate, any_graph, climb, close, common, masses, problem, wavy
from support.sample import examples

# By hand


def test_star_by_hand() -> None:
    """Speeds 1 and 3, rate 1. Step 0: (1, 3), worker 1 sends half: x = (2.5, 1.5), w = (1.5, .5). Step 1: (3.5, 4.5),
    the hub sends half: x = (1.75, 6.25), w = (.75, 1.25)."""
    history = run_gossip(np.zeros(1), climb(1, 3), topology=topology("star", 2), steps=2, lr=1.0, tau=None)
    assert [s.x.ravel().tolist() for s in history] == [[0, 0], [2.5, 1.5], [1.75, 6.25]]
    assert [s.w.tolist() for s in history] == [[1, 1], [1.5, 0.5], [0.75, 1.25]]
    close(history[1].z.ravel(), [5 / 3, 3])
    assert not any(s.flying_x.any() or s.flying_w.any() for s in history)


def test_overlap_by_hand() -> None:
    """The same, one step late. Step 0: worker 1 keeps 1.5 and sends 1.5. Step 1: (2, 4.5), the hub keeps 1, sends 1,
    and mixes the 1.5 of the step before."""
    options: dict[str, Any] = {"topology": topology("star", 2), "lr": 1.0, "overlap": True}
    history = run_gossip(np.zeros(1), climb(1, 3), steps=2, tau=None, **options)
    assert [s.x.ravel().tolist() for s in history] == [[0, 0], [1, 1.5], [2.5, 4.5]]
    assert [s.w.tolist() for s in history] == [[1, 1], [1, 0.5], [1, 0.5]]
    assert [s.flying_x.ravel().tolist() for s in history] == [[0, 0], [0, 1.5], [1, 0]]
    assert [s.flying_w.tolist() for s in history] == [[0, 0], [0, 0.5], [0.5, 0]]
    # The total is 8, so the mean is 4 whether or not step 1 mixes.
    for s in (run_gossip(np.zeros(1), climb(1, 3), steps=2, tau=2, beta=0.0, **options)[-1],
              run_gossip(np.zeros(1), climb(1, 3), epochs=[(2, 2)], tau=None, **options)[-1]):  # fmt: skip
        assert s.z.ravel().tolist() == s.x.ravel().tolist() == [4, 4]
        assert s.w.tolist() == [1, 1]
        assert not s.flying_x.any()
        assert not s.flying_w.any()


def test_noaverage_lets_messages_fly_by_hand() -> None:
    """Block 0 ends at z = (2.5, 9), v = -z: at alpha 1 nothing moves. Step 2: (3.5, 7.5); worker 1 keeps 3.75 and mixes
    the 1 that was in flight over the outer step. Step 3: (4.5, 7.75); the hub mixes 3.75 with its 2.25: 6, w = .75;
    worker 1 has 7.75, w = .75. So z = (8, 31/3), Delta = (-5.5, -4/3), v = (-6.75, -35/6) and z = (9.25, 89/6)."""
    history = run_gossip(np.zeros(1), climb(1, 3), topology=topology("star", 2), steps=4, lr=1.0, overlap=True, tau=2,
                         beta=0.5, average=False)  # fmt: skip
    assert [s.outer for s in history] == [False, False, True, False, True]
    assert history[2].z.ravel().tolist() == [2.5, 9]
    assert history[2].flying_x.ravel().tolist() == [1, 0]
    close(history[3].x.ravel(), [3.5, 4.75])
    last = history[4]
    close(last.z.ravel(), [9.25, 89 / 6])
    close(last.anchor.ravel(), [9.25, 89 / 6])
    close(last.v.ravel(), [-6.75, -35 / 6])
    close(last.w, [0.75, 0.75])
    close(last.x.ravel(), [9.25 * 0.75, 89 / 8])
    close(last.flying_x.ravel(), [2.25, 0])


def test_a_worker_that_is_done_mixes() -> None:
    """Full, speeds 1 and 3, rate 1; worker 1 has one batch. Both at 2, then at 2.5, 3 and 3.5 with worker 0's steps."""
    history = run_gossip(np.zeros(1), climb(1, 3), topology=topology("full", 2), epochs=[(4, 1)], lr=1.0, tau=None)
    assert [s.x.ravel().tolist() for s in history] == [[v, v] for v in (0, 2, 2.5, 3, 3.5, 3.5)]
    assert [s.behind.tolist() for s in history] == [[0, 0], [0, 0], [0, 1], [0, 2], [0, 3], [0, 3]]
    assert [s.joined for s in history] == [False] * 5 + [True]


def test_a_worker_without_steps_of_its_own_keeps_v() -> None:
    """noaverage, full, tau 2; worker 1 is done after block 0. Its rate of block 1 is 0: v does not enter and stays, and
    it takes the mean as it comes; worker 0's v has 1/2 of the one before in it."""
    history = run_gossip(np.zeros(1), climb(1, 3), topology=topology("full", 2), epochs=[(4, 2)], lr=1.0, tau=2,
                         average=False)  # fmt: skip
    assert history[2].v.ravel().tolist() == [-4, -4]
    assert history[2].z.ravel().tolist() == [4, 4]
    assert history[4].v.ravel().tolist() == [-3, -4]
    assert history[4].gamma.ravel().tolist() == [1, 0]
    assert history[4].z.ravel().tolist() == [7, 5]
    assert history[5].z.ravel().tolist() == [6, 6]
    assert history[5].anchor.ravel().tolist() == [7, 5]


# Message by message


def retell(x0: Array, gradient: Gradient, *, p: Array, epochs: Sequence[Sequence[int]], lr: Rate, tau: int | None,
           alpha: float, beta: float, nesterov: bool, scale_by_lr: bool, momentum: float, inner_state: str,
           average: bool, overlap: bool,
           warmup: int) -> list[tuple[list[Array], list[float], list[Array], list[Array]]]:  # fmt: skip
    """Return z, w, anchor and v of each worker after every step and join: one worker at a time, messages in a box, the
    outer step in the rearranged form. SGD with momentum on x = w z."""
    m, clock = p.shape[1], 0
    x, w, buffer, had = [x0] * m, [1.0] * m, [np.zeros(D)] * m, [0] * m
    anchor, v, previous = [x0] * m, [np.zeros(D)] * m, [0.0] * m
    own, sums, covered = [0] * m, [0.0] * m, [0] * m
    box: list[tuple[int, Array, float]] = []  # to, numerator, weight
    told = []

    def record() -> None:
        told.append(([a / b for a, b in zip(x, w, strict=True)], list(w), list(anchor), list(v)))

    def gather() -> Array:
        mean: Array = sum((a for _, a, _ in box), sum(x)) / sum((b for _, _, b in box), sum(w))
        box.clear()
        return mean

    def slow(i: int, mean: Array, gamma: float) -> Array:
        delta, ratio = anchor[i] - mean, (gamma / previous[i] if previous[i] else 1.0) if scale_by_lr else 1.0
        idle = scale_by_lr and gamma == 0
        carried = 0 * v[i] if idle else beta * ratio * v[i]
        back = alpha * beta * (carried + delta) if nesterov else alpha * carried
        v[i], previous[i] = (v[i], previous[i]) if idle else (carried + delta, gamma)
        anchor[i] = mean + (1 - alpha) * delta - back
        return anchor[i]

    for batches in epochs:
        left = list(batches)
        while any(left):
            if tau and clock >= warmup and (clock - warmup) % tau == 0 and inner_state != "maintain":
                buffer = [np.zeros(D) if inner_state == "reset" else sum(buffer) / m] * m
            live = [i for i in range(m) if left[i]]
            g = {i: gradient(i, had[i], x[i] / w[i]) for i in live}
            if clock < warmup:
                g = dict.fromkeys(range(m), sum(g.values()) / len(live))
            for i in g:
                buffer[i] = momentum * buffer[i] + g[i]
                rate = lr(i, clock, 0)
                x[i] = x[i] - rate * buffer[i]  # the step at z, not scaled by w
                own[i], sums[i], covered[i] = own[i] + 1, sums[i] + rate, covered[i] + 1
            for i in live:
                left[i], had[i] = left[i] - 1, had[i] + 1
            clock += 1
            k, full = clock - warmup, tau is not None and clock > warmup and (clock - warmup) % tau == 0
            if k == 0:
                anchor, sums, covered = list(x) if tau else anchor, [0.0] * m, [0] * m
            if k > 0 and not (full and average):
                late, box = list(box), []  # the names of the closures above are these
                share = p[(k - 1) % len(p)]
                box += [(i, share[i, j] * x[j], share[i, j] * w[j]) for i in range(m) for j in range(m) if i != j]
                x, w = [share[i, i] * x[i] for i in range(m)], [share[i, i] * w[i] for i in range(m)]
                came = late if overlap else box
                for to, a, b in came:
                    x[to], w[to] = x[to] + a, w[to] + b
                if not overlap:
                    box = []
            if full:
                if average:
                    mean, gamma = gather(), sum(sums) / sum(covered)
                    x, w = [slow(i, mean, gamma) for i in range(m)], [1.0] * m
                else:
                    x = [w[i] * slow(i, x[i] / w[i], sums[i] / covered[i] if covered[i] else 0.0) for i in range(m)]
                sums, covered = [0.0] * m, [0] * m
            record()
        if clock >= warmup:
            x, w = [gather()] * m, [1.0] * m
        first = own.index(max(own))
        own, sums, covered = [clock] * m, [sums[first]] * m, [covered[first]] * m
        record()
    return told


@pytest.mark.slow
@examples(150)
@given(
    data=st.data(), m=st.integers(1, 4), period=st.integers(1, 3), seed=st.integers(0, 99), warmup=st.integers(0, 4),
    tau=st.sampled_from([None, 1, 2, 3, 5]), alpha=st.sampled_from([0.5, 1.0, 1.3]), beta=st.sampled_from([0.0, 0.6]),
    nesterov=st.booleans(), scale_by_lr=st.booleans(), momentum=st.sampled_from([0.0, 0.8]), average=st.booleans(),
    overlap=st.booleans(), inner_state=st.sampled_from(["maintain", "reset", "average"]), unequal=st.booleans(),
)  # fmt: skip
def test_message_by_message(
    data: st.DataObject, m: int, period: int, seed: int, warmup: int, momentum: float, unequal: bool, **c: Any
) -> None:
    """All features together, on graphs on which w changes."""
    one = st.lists(st.integers(0, 7), min_size=m, max_size=m)
    epochs = data.draw(st.lists(one, min_size=1, max_size=4))
    x0, gradient = problem(m, seed=seed)
    p = any_graph(m, period, seed)
    lr = wavy if unequal and not warmup else common
    history = run_gossip(x0, gradient, topology=p, epochs=epochs, lr=lr, base_options={"momentum": momentum},
                         warmup_steps=warmup, **c)  # fmt: skip
    told = retell(x0, gradient, p=p, epochs=epochs, lr=lr, momentum=momentum, warmup=warmup, **c)
    assert len(history) == 1 + len(told) == 1 + sum(max(batches) + 1 for batches in epochs)
    for s, (z, w, anchor, v) in zip(history[1:], told, strict=True):
        close(s.z, z, 1e-9)
        close(s.w, w)
        close(s.anchor, anchor, 1e-9)
        close(s.v, v, 1e-9)


# Mass and weights


@examples(150)
@given(
    data=st.data(), m=st.integers(1, 6), period=st.integers(1, 3), seed=st.integers(0, 99), average=st.booleans(),
    overlap=st.booleans(), tau=st.sampled_from([None, 1, 3, 4]), warmup_steps=st.integers(0, 3),
)  # fmt: skip
def test_mass_is_conserved(data: st.DataObject, m: int, period: int, seed: int, warmup_steps: int, **c: Any) -> None:
    """At every step the mass of weights is m, and that of numerators changes by the inner steps alone. Outer steps keep
    both at alpha 1 and beta 0; SGD without momentum, at a changing rate."""
    one = st.lists(st.integers(0, 8), min_size=m, max_size=m)
    epochs = data.draw(st.lists(one, min_size=1, max_size=3))
    x0, gradient = problem(m, seed=seed)
    moved = np.zeros(D)

    def recorded(i: int, step: int, z: Array) -> Array:
        g = gradient(i, step, z)
        seen.append((i, g))
        return g

    seen: list[tuple[int, Array]] = []
    total, clock = m * x0, 0
    for s in walk_gossip(x0, recorded, topology=any_graph(m, period, seed), epochs=epochs, lr=common, alpha=1, beta=0,
                         warmup_steps=warmup_steps, **c):  # fmt: skip
        if seen:
            weight = m / len(seen) if clock < warmup_steps else 1  # in warm-up all take the live ones' mean
            moved = -common(0, clock, 0) * weight * sum((g for _, g in seen), np.zeros(D))
            total, clock, seen = total + moved, clock + 1, []
        x, w = masses(s)
        close(w, m)
        close(x, total, 1e-11)
        close(s.x, s.w[:, np.newaxis] * s.z)
        assert s.w.min() > 0
        assert s.flying_w.min() >= 0
        if s.joined or (s.outer and c["average"]):
            assert np.array_equal(s.z, np.tile(s.z[0], (m, 1)))
            assert (s.w == 1).all()
            assert not s.flying_w.any()
        if not c["overlap"]:
            assert not s.flying_x.any()


@pytest.mark.parametrize("name", ["exponential", "bipartite", "complete", "ring", "full"])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 6, 8, 12])
def test_w_stays_one_on_regular_graphs(name: str, m: int) -> None:
    if name == "bipartite" and m % 2 and m > 1:
        return
    x0, gradient = problem(m)
    history = run_gossip(x0, gradient, topology=topology(name, m), steps=40, lr=wavy, tau=7)
    close([s.w for s in history], np.ones((41, m)), 1e-14)


@pytest.mark.parametrize("m", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("average", [False, True])
def test_w_settles_at_two_thirds_under_overlap(m: int, average: bool) -> None:
    """w_k = 2/3 + 1/3 (-1/2)^k from 1, on one peer and half kept."""
    x0, gradient = problem(m)
    history = run_gossip(x0, gradient, topology=topology("exponential", m), steps=60, lr=wavy, overlap=True, tau=20,
                         average=average)  # fmt: skip
    for s in history:
        k = s.step % 20 if average else s.step
        close(s.w, np.full(m, 2 / 3 + (-1 / 2) ** k / 3))
        close(s.flying_w, 1 - s.w)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["exponential", "complete", "ring", "full", "star"])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
@pytest.mark.slow
@pytest.mark.sample(every=3)
def test_consensus(name: str, m: int, overlap: bool) -> None:
    """At rate 0, after a step that separates the workers, z converges to the mean, even if w does not converge to 1."""
    spread = np.random.default_rng(0).normal(size=(m, D))
    history = run_gossip(np.zeros(D), lambda i, step, z: spread[i], topology=topology(name, m), steps=400,
                         lr=lambda i, step, group: -1.0 if step == 0 else 0.0, overlap=overlap, tau=None)  # fmt: skip
    close(history[-1].z, np.tile(spread.mean(axis=0), (m, 1)), 1e-11)
    if name == "exponential" and m in (1, 2, 8) and not overlap:
        close(history[max(1, int(math.log2(m)))].z, np.tile(spread.mean(axis=0), (m, 1)), 1e-14)
    if name == "star" and m > 1:
        assert np.abs(history[-1].w - 1).max() > 0.1
        assert np.abs(history[-1].x - spread.mean(axis=0)).max() > 0.01


# Closed forms


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["star", "exponential", "ring"])
@pytest.mark.parametrize("m", [2, 3, 5])
def test_quadratics_are_one_dense_matrix(name: str, m: int, overlap: bool) -> None:
    """With gradients A_i z - b_i a step is affine in (numerators, numerators on their way): K steps are a product of
    dense matrices on 2 m d + 1 numbers, with the weights from their own product."""
    p = topology(name, m)
    rng = np.random.default_rng(m)
    a, b, rate, steps = rng.normal(size=(m, D, D)), rng.normal(size=(m, D)), 0.05, 25
    a = a @ a.transpose(0, 2, 1) / D
    x0 = rng.normal(size=D)
    n, eye = m * D, np.eye(D)
    whole, w = np.eye(2 * n + 1), np.concatenate([np.ones(m), np.zeros(m)])
    for step in range(steps):
        share = p[step % len(p)]
        own, rest = np.diag(np.diag(share)), share - np.diag(np.diag(share))
        base = np.eye(2 * n + 1)
        for i in range(m):
            rows = slice(i * D, (i + 1) * D)
            base[rows, rows] -= rate * a[i] / w[i]
            base[rows, -1] = rate * b[i]
        if overlap:
            move = np.block([[own, np.eye(m)], [rest, np.zeros((m, m))]])
        else:
            move = np.block([[share, np.zeros((m, m))], [np.zeros((m, 2 * m))]])
        mix = np.eye(2 * n + 1)
        mix[:-1, :-1] = np.kron(move, eye)
        whole, w = mix @ base @ whole, move @ w
    final = whole @ np.concatenate([np.tile(x0, m), np.zeros(n), [1]])
    last = run_gossip(x0, lambda i, step, z: a[i] @ z - b[i], topology=p, steps=steps, lr=rate, overlap=overlap,
                      tau=None)[-1]  # fmt: skip
    close(last.x.ravel(), final[:n])
    close(last.w, w[:m])
    close(last.flying_x.sum(axis=0), final[n:-1].reshape(m, D).sum(axis=0))
    close(last.flying_w.sum(), w[m:].sum())


@pytest.mark.parametrize(("average", "beta"), [(True, 0.0), (True, 0.6), (False, 0.6)])
def test_a_common_quadratic_is_solved(average: bool, beta: float) -> None:
    """Different workers whose gradients vanish at one point: all z converge to it, on a graph on which w changes."""
    m, rng = 5, np.random.default_rng(0)
    curvature, solution = rng.uniform(0.5, 1, (m, D)), rng.normal(size=D)
    for overlap in (False, True):
        last = run_gossip(np.zeros(D), lambda i, step, z: curvature[i] * (z - solution), topology=topology("star", m),
                          steps=600, lr=0.1, tau=6, beta=beta, average=average, overlap=overlap)[-1]  # fmt: skip
        close(last.z, np.tile(solution, (m, 1)), 1e-7)
