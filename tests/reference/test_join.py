"""Compare the oracle for uneven data with values by hand, a second implementation, and the oracle for even data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from reference.join import Epoch, run_epochs
from reference.slowmo import run
from support.quadratics import Array, D, Gradient, Rate, close, common, problem, wavy
from support.sample import examples

Epochs = Sequence[Sequence[int]]
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {"weight_decay": 0.1}),
    "dampened": ("sgd", {"momentum": 0.8, "dampening": 0.3}),
    "nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "adam": ("adam", {"betas": (0.7, 0.95), "eps": 1e-3}),
    "adamw": ("adamw", {"eps": 1e-3}),
}


def column(history: list[Epoch]) -> list[float]:
    """Return x of a problem with one coordinate, after checking that the workers agree."""
    for e in history:
        assert np.array_equal(e.x, np.tile(e.x[0], (len(e.x), 1)))
    return [e.x[0].item() for e in history]


def climb(*speeds: float) -> Gradient:
    """Return constant gradients: worker i climbs by speeds[i] x rate in every step (d = 1)."""
    return lambda worker, step, x: np.array([-speeds[worker]])


# By hand


def test_by_hand() -> None:
    """Speeds 1 and 6, rate 1/4, tau 4, alpha 1, beta 1/2.

    Epoch 0, (6, 3). Block 0 from 0: worker 0 at 1 with share 1, worker 1 at 4.5 with share 3/4, mean
    (4 * 1 + 3 * 4.5) / 7 = 2.5 = x_1, v_1 = -2.5. Block 1: worker 0 takes 2 steps to 3, worker 1 stays with share 0:
    the join gives 3, at step 6, 3 ahead of worker 1.
    Epoch 1, (6, 3). Block 1 goes on for 2 steps: 3.5 and 6, shares 1/2, mean 4.75, Delta = 2.5 - 4.75 = -2.25,
    v_2 = -1.25 - 2.25 = -3.5, x_2 = 6. Block 2: worker 0 at 7, worker 1 takes its last step to 7.5 with share 1/4:
    mean (4 * 7 + 7.5) / 5 = 7.1, v_3 = -1.75 - 1.1 = -2.85, x_3 = 8.85. The block ends with the epoch.
    Epoch 2, none: no change. Epoch 3, (0, 2): worker 1 alone, to 8.85 + 3 = 11.85; the outer step is still to come.
    """
    epochs = [(6, 3), (6, 3), (0, 0), (0, 2)]
    history = run_epochs(np.zeros(1), climb(1, 6), epochs=epochs, workers=2, lr=0.25, tau=4, alpha=1, beta=0.5)
    close(column(history), [3, 8.85, 8.85, 11.85])
    close([e.anchor.item() for e in history], [2.5, 8.85, 8.85, 8.85])
    close([e.v.item() for e in history], [-2.5, -2.85, -2.85, -2.85])
    close([e.gamma.item() for e in history], [0.25] * 4)
    assert [e.step for e in history] == [6, 12, 12, 14]
    assert [e.behind.tolist() for e in history] == [[0, 3], [0, 3], [0, 0], [2, 0]]
    assert [e.outer_steps for e in history] == [1, 3, 3, 3]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_worker_without_data_follows(scaled: bool) -> None:
    """Its weight is always 0: the others train as if it did not exist, and it takes their result.

    It affects only gamma, and only if a join divides a block, since it then has the sum of rates of the worker with the
    most steps. So the rate is constant here, or does not matter.
    """
    x0, gradient = problem(3)
    config: dict[str, Any] = {"lr": 0.2 if scaled else wavy, "scale_by_lr": scaled, "tau": 4, "beta": 0.6, "alpha": 0.8}
    epochs = [(6, 3), (1, 2), (5, 9)]
    two = run_epochs(x0, gradient, epochs=epochs, workers=2, **config)
    three = run_epochs(x0, gradient, epochs=[(*e, 0) for e in epochs], workers=3, **config)
    for a, b in zip(two, three, strict=True):
        close(b.x, np.tile(a.x[0], (3, 1)))
        close(b.anchor, a.anchor)
        close(b.v, a.v)
        assert (b.step, b.outer_steps) == (a.step, a.outer_steps)
    assert [e.behind.tolist() for e in three] == [[0, 3, 6], [1, 0, 2], [4, 0, 9]]
    assert [e.step for e in three] == [6, 8, 17]


def test_a_join_within_a_block_keeps_it() -> None:
    """tau 5, epochs of 3, speeds 1 and 3, rate 1: joins at 3, 6, 9; outer steps at 5 and, in epoch 3, at 10."""
    history = run_epochs(np.zeros(1), climb(1, 3), epochs=[(3, 3)] * 4, workers=2, lr=1.0, tau=5, alpha=1, beta=0.5)
    assert [e.outer_steps for e in history] == [0, 1, 1, 2]
    # 2 per step on average. Block 0: 10 = x_1, v_1 = -10. Block 1 from 10: 20, Delta = -10, v_2 = -15, x_2 = 25.
    close(column(history), [6, 10 + 2, 10 + 8, 25 + 4])
    close([e.anchor.item() for e in history], [0, 10, 10, 25])
    close([e.v.item() for e in history], [0, -10, -10, -15])


def test_epochs_shorter_than_a_block() -> None:
    """tau 7, epochs (2, 1), speeds 1 and 4, rate 1, plain averaging. A join gives (2 * 2 + 1 * 4) / 3 = 8/3 more.

    The outer step falls after the first round of epoch 3: mean (1 + 4) / 2 = 2.5; then worker 0 goes on alone.
    """
    history = run_epochs(np.zeros(1), climb(1, 4), epochs=[(2, 1)] * 7, workers=2, lr=1.0, tau=7, alpha=1, beta=0)
    close(np.diff([0, *column(history)]), [8 / 3, 8 / 3, 8 / 3, 2.5 + 1, 8 / 3, 8 / 3, 8 / 3])
    assert [e.outer_steps for e in history] == [0, 0, 0, 1, 1, 1, 2]
    assert [e.step for e in history] == [2, 4, 6, 8, 10, 12, 14]
    assert [e.behind.tolist() for e in history] == [[0, 1]] * 7
    close([e.anchor.item() for e in history], [0, 0, 0, 10.5, 10.5, 10.5, 10.5 + 1 + 8])


def test_without_blocks() -> None:
    """tau None: one average by steps, (3 * 3 + 1 * 5) / 4 = 3.5, then (0 + 2 * 10) / 2 more, then nothing."""
    history = run_epochs(np.zeros(1), climb(1, 5), epochs=[(3, 1), (0, 2), (0, 0)], workers=2, lr=1.0, tau=None)
    assert column(history) == [3.5, 13.5, 13.5]
    assert [e.step for e in history] == [3, 5, 5]
    assert [e.behind.tolist() for e in history] == [[0, 2], [2, 0], [0, 0]]
    assert not any(e.outer_steps or e.anchor.any() or e.v.any() for e in history)


@pytest.mark.parametrize(
    ("epochs", "gamma"),
    [
        # Rates 1 + clock, ten times as much on worker 1.
        ([(6, 3)], (10 + 60) / 7),  # the unfinished part counts once,
        ([(8, 3)], 26 / 4),  # and then no more
        ([(8, 4)], 26 / 4),
        ([(6, 3), (2, 1)], (11 + 15 + 11 + 70) / 7),  # both go on from 5 + 6, over 2 steps
        ([(6, 3), (2, 0)], (11 + 15 + 11) / 6),
        ([(6, 3), (0, 2)], (11 + 11 + 70 + 80) / 6),
        ([(1, 1), (3, 3)], (1 + 9 + 1 + 90) / 8),  # a tie: the first
        ([(1, 2), (2, 2)], (30 + 7 + 30 + 70) / 8),
        ([(1, 2), (1, 1), (1, 1)], (30 + 3 + 4 + 30 + 3 + 40) / 8),  # after the second join both have worker 0's
    ],
)
def test_gamma_is_sum_over_sum(epochs: Epochs, gamma: float) -> None:
    def lr(worker: int, step: int, group: int) -> float:
        return (1 + 9 * worker) * (1 + step)

    history = run_epochs(np.zeros(1), climb(1, 1), epochs=epochs, workers=2, lr=lr, tau=4)
    close(history[-1].gamma.item(), gamma)


def test_averages_weigh_by_steps() -> None:
    """A worker with n steps until the next average moves by c / n^2 in each, the c sum to 0: no mean ever moves.

    tau 6: the join at 3, the outer step at 6, which ends the second epoch's block and gives (3, 2, 1) the shares
    1/2, 1/3, 1/6, not 1 and less, and the join at 7, of worker 2 alone (c = 0 there).
    """
    c = np.array([[1.0, -2.0], [0.5, 3.0], [-1.5, -1.0]])
    epochs = [(3, 1, 2), (3, 2, 1), (0, 0, 1)]

    def gradient(worker: int, step: int, x: Array) -> Array:
        n = [e[worker] for e in epochs for _ in range(e[worker])]  # of every step
        moving = step < epochs[0][worker] + epochs[1][worker]
        return np.asarray(c[worker] * moving / n[step] ** 2, dtype=np.float64)

    x0 = np.array([3.0, -1.0])
    history = run_epochs(x0, gradient, epochs=epochs, workers=3, lr=0.1, tau=6, beta=0.7)
    for e in history:
        close(e.x, np.tile(x0, (3, 1)), 1e-15)
        close(e.v, [0, 0], 1e-15)
    assert [e.outer_steps for e in history] == [0, 1, 1]


# Against run


@examples(60)
@given(
    name=st.sampled_from(sorted(BASES)), workers=st.integers(1, 4), tau=st.integers(1, 4),
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=4), alpha=st.sampled_from([0.7, 1.0]),
    beta=st.sampled_from([0.0, 0.6]), nesterov=st.booleans(), scale_by_lr=st.booleans(), n_groups=st.integers(1, 2),
    inner_state=st.sampled_from(["maintain", "reset", "average"]), gradients=st.sampled_from(["local", "all"]),
)  # fmt: skip
@pytest.mark.slow
def test_whole_blocks_are_run(name: str, tau: int, workers: int, lengths: list[int], n_groups: int, **c: Any) -> None:
    """With equal epochs of whole blocks a join changes nothing: the results are bitwise identical."""
    base, options = BASES[name]
    x0, gradient = problem(workers)
    c |= {"base": base, "base_options": options, "groups": np.arange(D) % n_groups, "tau": tau, "lr": wavy}
    ends = tau * np.cumsum(lengths)
    history = run(x0, gradient, steps=int(ends[-1]), workers=workers, **c)
    epochs = run_epochs(x0, gradient, epochs=[[n * tau] * workers for n in lengths], workers=workers, **c)
    for end, length, e in zip(ends, np.cumsum(lengths), epochs, strict=True):
        s = history[end]
        assert np.array_equal(e.x, s.x)
        assert np.array_equal(e.anchor, s.anchor)
        assert np.array_equal(e.v, s.v)
        assert np.array_equal(e.gamma, s.gamma)
        assert [e.step, e.outer_steps, *e.behind] == [end, length, *[0] * workers]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("buffers", ["maintain", "reset", "average"])
@pytest.mark.parametrize("tau", [1, 4, 5, None])
def test_one_worker_never_notices_a_join(name: str, buffers: str, tau: int | None) -> None:
    base, options = BASES[name]
    x0, gradient = problem(1)
    c: dict[str, Any] = {"workers": 1, "lr": wavy, "base": base, "base_options": options, "tau": tau,
                         "inner_state": buffers, "groups": np.arange(D) % 2, "warmup_steps": 5}  # fmt: skip
    lengths = [3, 0, 4, 1, 6, 11, 2]
    history = run(x0, gradient, steps=sum(lengths), **c)
    for end, e in zip(np.cumsum(lengths), run_epochs(x0, gradient, epochs=[[n] for n in lengths], **c), strict=True):
        s = history[end]
        close([*e.x[0], *e.anchor, *e.v, *e.gamma], [*s.x[0], *s.anchor, *s.v, *s.gamma])


# A second implementation: worker by worker, and the outer step in algorithm.md's rearranged form


def retell(x0: Array, gradient: Gradient, *, epochs: Epochs, workers: int, lr: Rate, groups: NDArray[np.int64],
           tau: int, alpha: float, beta: float, nesterov: bool, scale_by_lr: bool, momentum: float, inner_state: str,
           ) -> list[tuple[Array, Array, Array, Array, int, list[int], int]]:  # fmt: skip
    """Train SGD with momentum and local gradients. Return the fields of Epoch per epoch, with x of one worker."""
    m, n_groups = workers, groups.max() + 1
    x, buffer, had = [x0] * m, [np.zeros(D)] * m, [0] * m
    anchor, v, previous = x0, np.zeros(D), np.zeros(n_groups)
    clock = start = outer_steps = 0
    carried: tuple[Array, int] = (np.zeros(n_groups), 0)
    result = []
    for batches in epochs:
        left, own, since = list(batches), [clock] * m, [0] * m
        sums, covered = [carried[0]] * m, [carried[1]] * m
        while True:
            for i in range(m):
                while left[i] and own[i] < start + tau:
                    rates = np.array([lr(i, own[i], j) for j in range(n_groups)])
                    buffer[i] = momentum * buffer[i] + gradient(i, had[i], x[i])
                    x[i] = x[i] - rates[groups] * buffer[i]
                    sums[i] = sums[i] + rates
                    covered[i] += 1
                    since[i] += 1
                    own[i] += 1
                    had[i] += 1
                    left[i] -= 1
            if max(own) < start + tau:
                break
            start += tau
            mean = np.average(x, axis=0, weights=since)
            gamma = np.sum(sums, axis=0) / sum(covered)
            ratio = gamma / previous if scale_by_lr and outer_steps else np.ones(n_groups)
            delta, w = anchor - mean, beta * ratio[groups] * v
            v, previous, outer_steps = w + delta, gamma, outer_steps + 1
            anchor = mean + (1 - alpha) * delta - alpha * (beta * v if nesterov else w)
            x, since, covered, sums = [anchor] * m, [0] * m, [0] * m, [np.zeros(n_groups)] * m
            if inner_state != "maintain":
                buffer = [np.zeros(D) if inner_state == "reset" else np.mean(buffer, axis=0)] * m
        clock = max(own)
        if any(since):
            x = [np.average(x, axis=0, weights=since)] * m
        first = own.index(clock)
        carried = (sums[first], covered[first])
        result.append((x[0], anchor, v, previous, clock, [clock - n for n in own], outer_steps))
    return result


@pytest.mark.slow
@examples(150)
@given(
    data=st.data(), workers=st.integers(1, 4), tau=st.integers(1, 6), seed=st.integers(0, 99),
    alpha=st.sampled_from([0.5, 1.0, 1.3]), beta=st.sampled_from([0.0, 0.6]), nesterov=st.booleans(),
    scale_by_lr=st.booleans(), momentum=st.sampled_from([0.0, 0.8]), n_groups=st.integers(1, 2),
    inner_state=st.sampled_from(["maintain", "reset", "average"]), lr=st.sampled_from([wavy, common]),
)  # fmt: skip
def test_second_telling(data: st.DataObject, workers: int, seed: int, n_groups: int, momentum: float, **c: Any) -> None:
    one = st.lists(st.integers(0, 13), min_size=workers, max_size=workers)
    epochs = data.draw(st.lists(one, min_size=1, max_size=5))
    x0, gradient = problem(workers, seed=seed)
    c |= {"epochs": epochs, "workers": workers, "groups": np.arange(D) % n_groups}
    history = run_epochs(x0, gradient, base_options={"momentum": momentum}, **c)
    for e, told in zip(history, retell(x0, gradient, momentum=momentum, **c), strict=True):
        assert np.array_equal(e.x, np.tile(e.x[0], (workers, 1)))
        for a, b in zip((e.x[0], e.anchor, e.v, e.gamma), told[:4], strict=True):
            close(a, b, 1e-11)
        assert (e.step, e.behind.tolist(), e.outer_steps) == told[4:]


# Averaged gradients


def merged(gradient: Gradient, epochs: Epochs, warmup: int | None = None) -> tuple[Gradient, list[int]]:
    """Return the gradient of one worker with the batches of all live workers at each step, and the ends of the epochs.
    From step `warmup` on, those of worker 0 alone."""
    had = [0] * len(epochs[0])
    rounds: list[list[tuple[int, int]]] = []
    for batches in epochs:
        for k in range(max(batches)):
            live = [i for i, n in enumerate(batches) if k < n]
            rounds.append([(i, had[i] + k) for i in live if warmup is None or i == 0 or len(rounds) < warmup])
        had = [a + n for a, n in zip(had, batches, strict=True)]

    def one(worker: int, step: int, x: np.ndarray) -> np.ndarray:
        return np.mean([gradient(i, own, x) for i, own in rounds[step]], axis=0)

    return one, np.cumsum([max(batches) for batches in epochs]).tolist()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("buffers", ["maintain", "reset", "average"])
@pytest.mark.parametrize(
    ("tau", "gradients", "warmup"), [(None, "all", 0), (4, "all", 0), (4, "all", 7), (4, "local", 40)]
)
def test_averaged_gradients_are_one_big_batch(
    name: str, buffers: str, tau: int | None, gradients: str, warmup: int
) -> None:
    base, options = BASES[name]
    x0, gradient = problem(3)
    epochs = [(6, 3, 0), (0, 2, 1), (5, 9, 2), (0, 0, 0), (3, 3, 3)]
    one, ends = merged(gradient, epochs)
    c: dict[str, Any] = {"lr": common, "base": base, "base_options": options, "tau": tau, "inner_state": buffers,
                         "gradients": gradients, "warmup_steps": warmup, "beta": 0.6, "alpha": 0.9}  # fmt: skip
    history = run(x0, one, steps=ends[-1], workers=1, **c)
    outer_steps = 0 if tau is None else [sum(s.outer for s in history[: end + 1]) for end in ends][-1]
    joined = run_epochs(x0, gradient, epochs=epochs, workers=3, **c)
    for end, e in zip(ends, joined, strict=True):
        s = history[end]
        assert np.array_equal(e.x, np.tile(e.x[0], (3, 1)))
        close([*e.x[0], *e.anchor, *e.v, *e.gamma], [*s.x[0], *s.anchor, *s.v, *s.gamma], 1e-12)
        assert [e.step, *e.behind] == [end, 0, 0, 0]
    assert joined[-1].outer_steps == outer_steps


@pytest.mark.parametrize("tau", [2, 5, None])
def test_warmup_ends_while_a_worker_is_done(tau: int | None) -> None:
    """Worker 1 has 3 batches, warm-up is 6 steps, worker 0 has 12: worker 1 follows warm-up, then weighs 0."""
    x0, gradient = problem(2)
    epochs = [(2, 1), (10, 2)]
    one, ends = merged(gradient, epochs, warmup=6)
    c: dict[str, Any] = {"lr": common, "tau": tau, "beta": 0.6, "warmup_steps": 6, "base_options": {"momentum": 0.5}}
    history = run(x0, one, steps=12, workers=1, **c)
    joined = run_epochs(x0, gradient, epochs=epochs, workers=2, **c)
    for end, e in zip(ends, joined, strict=True):
        s = history[end]
        close([*e.x[1], *e.anchor, *e.v, *e.gamma], [*s.x[0], *s.anchor, *s.v, *s.gamma])
    assert [e.behind.tolist() for e in joined] == [[0, 0], [0, 6]]
    assert [e.outer_steps for e in joined] == [0, {2: 3, 5: 1, None: 0}[tau]]


def test_the_rate_of_a_worker_that_is_done() -> None:
    """Rates 1, 2 and 4; worker 0 is done and takes worker 1's, the first live one's. They differ: the join averages.

    Gradient -1 throughout: after two rounds 1 + 2, 2 + 2 and 4 + 4, all with share 2/3. The third round fills the
    block, all live: mean 15 / 3 + 7 / 3. At the join the sums were 3, 4 and 8; all went on with worker 0's.
    """
    history = run_epochs(np.zeros(1), climb(1, 1, 1), epochs=[(1, 2, 2), (1, 1, 1)], workers=3, tau=3, beta=0,
                         lr=lambda worker, step, group: 2.0**worker, gradients="all")  # fmt: skip
    close(column(history), [5, 22 / 3])
    close(history[1].gamma.item(), (3 + 1 + 3 + 2 + 3 + 4) / 9)
    assert [e.behind.any() for e in history] == [False, False]


# Inner state


def test_the_mean_of_buffers_counts_a_worker_without_any() -> None:
    """Adam, rate 1, gradient 1, betas 1/2 and 3/4, eps 0; worker 1 has no data. The first step is 1, as always. Then
    the inner state .5 and .25 and the step count 1 become .25, .125 and .5, on both workers; worker 0's second step:
    count 1.5, .125 + .5 and .09375 + .25."""
    history = run_epochs(np.zeros(1), climb(1, 1), epochs=[(1, 0), (1, 0)], workers=2, lr=1.0, tau=1, beta=0,
                         base="adam", base_options={"betas": (0.5, 0.75), "eps": 0.0},
                         inner_state="average")  # fmt: skip
    second = (0.625 / (1 - 0.5**1.5)) / math.sqrt(0.34375 / (1 - 0.75**1.5))
    close(column(history), [1, 1 + second])


# Errors


def test_errors() -> None:
    x0, gradient = problem(2)
    for epochs in ([(1,)], [(1, 2), (1, 2, 3)], [(1, -1)]):
        with pytest.raises(ValueError, match="every epoch"):
            run_epochs(x0, gradient, epochs=epochs, workers=2, lr=0.1)
    with pytest.raises(ValueError, match="positive"):
        run_epochs(x0, gradient, epochs=[], workers=2, lr=0.1, tau=0)
    with pytest.raises(ValueError, match="unknown base"):
        run_epochs(x0, gradient, epochs=[], workers=2, lr=0.1, inner_state="keep")
    with pytest.raises(ValueError, match="join in warm-up"):
        run_epochs(x0, gradient, epochs=[(2, 2)], workers=2, lr=wavy, warmup_steps=3)
    with pytest.raises(ValueError, match="end of warm-up"):
        run_epochs(x0, gradient, epochs=[(4, 4)], workers=2, lr=wavy, warmup_steps=3)
    assert run_epochs(x0, gradient, epochs=[], workers=2, lr=0.1) == []
