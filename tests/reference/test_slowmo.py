"""The NumPy oracle against what is not itself: torch's optimizers, the published formulas, numbers by hand, theory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from reference.slowmo import Snapshot, run
from support.quadratics import Array, D, Gradient, Rate, close, common, problem, wavy


def xs(history: list[Snapshot]) -> Array:
    """(steps + 1, m, d)"""
    return np.array([s.x for s in history])


BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "sgd-decay": ("sgd", {"weight_decay": 0.1}),
    "momentum": ("sgd", {"momentum": 0.9}),
    "dampened": ("sgd", {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05}),
    "nesterov": ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": ("adam", {}),
    "adam-options": ("adam", {"betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    "adamw": ("adamw", {}),
    "adamw-options": ("adamw", {"betas": (0.8, 0.98), "eps": 1e-6, "weight_decay": 0.2}),
}
TORCH: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class TorchWorker:
    """One worker: a torch optimizer over one tensor per parameter group."""

    def __init__(self, x0: Array, groups: NDArray[np.int64], base: str, options: dict[str, Any]) -> None:
        self.masks = [groups == g for g in range(groups.max() + 1)]
        self.params = [torch.tensor(x0[c], dtype=torch.float64) for c in self.masks]
        self.make = lambda: TORCH[base]([{"params": [p]} for p in self.params], lr=1.0, foreach=False, **options)
        self.optimizer: Any = self.make()

    @property
    def x(self) -> Array:
        x = np.empty(self.masks[0].shape)
        for c, p in zip(self.masks, self.params, strict=True):
            x[c] = p.numpy()
        return x

    def set(self, x: Array) -> None:
        for c, p in zip(self.masks, self.params, strict=True):
            p.copy_(torch.tensor(x[c]))

    def step(self, gradient: Array, rates: list[float]) -> None:
        for c, p, group, rate in zip(self.masks, self.params, self.optimizer.param_groups, rates, strict=True):
            p.grad, group["lr"] = torch.tensor(gradient[c]), float(rate)
        self.optimizer.step()

    def buffers(self) -> list[tuple[dict[str, Any], str]]:
        states = [self.optimizer.state[p] for p in self.params]
        return [(s, name) for s in states for name, value in s.items() if value is not None]


def torch_slowmo(
    x0: Array, gradient: Gradient, *, steps: int, workers: int, lr: Rate, base: str,
    options: dict[str, Any], groups: NDArray[np.int64], tau: int | None, alpha: float = 1.0, beta: float = 0.0,
    nesterov: bool = False, scale_by_lr: bool = True, buffers: str = "maintain", gradients: str = "local",
    warmup_steps: int = 0,
) -> Array:  # fmt: skip
    """algorithm.md's oracle: an outer torch SGD(lr=alpha, momentum=beta, nesterov) on Delta, its momentum buffer
    rescaled where the rate changes, over one torch optimizer per worker. Returns (steps + 1, m, d)."""
    team = [TorchWorker(x0, groups, base, options) for _ in range(workers)]
    outer = TorchWorker(x0, groups, "sgd", {"momentum": beta, "nesterov": nesterov and beta > 0})
    n_groups, previous, k = len(outer.params), None, 0
    rates_seen: list[list[float]] = []
    result = [np.array([w.x for w in team])]
    for step in range(steps):
        warm = step < warmup_steps
        if not warm and k == 0:
            if step == warmup_steps:
                outer.set(team[0].x)
            rates_seen = []
            if buffers == "reset" and tau is not None:
                for w in team:
                    w.optimizer = w.make()
            elif buffers == "average" and tau is not None:
                for entries in zip(*(w.buffers() for w in team), strict=True):
                    mean = torch.stack([s[name] for s, name in entries]).mean(dim=0)
                    for s, name in entries:
                        s[name] = mean.clone()
        g = [gradient(i, step, w.x) for i, w in enumerate(team)]
        if warm or gradients == "all":
            g = [sum(g) / workers] * workers
        for i, w in enumerate(team):
            rates = [lr(i, step, j) for j in range(n_groups)]
            rates_seen.append(rates)
            w.step(g[i], rates)
        k += not warm
        if k == tau:
            k = 0
            gamma = np.mean(rates_seen, axis=0)
            if scale_by_lr and previous is not None and beta > 0:
                for p, ratio in zip(outer.params, gamma / previous, strict=True):
                    outer.optimizer.state[p]["momentum_buffer"].mul_(ratio)
            previous = gamma
            outer.step(outer.x - np.mean([w.x for w in team], axis=0), [alpha] * n_groups)
            for w in team:
                w.set(outer.x)
        result.append(np.array([w.x for w in team]))
    return np.array(result)


# The base optimizers and the whole, against torch


@pytest.mark.parametrize("name", BASES)
def test_base_alone_is_torch(name: str) -> None:
    base, options = BASES[name]
    steps, groups = 300, np.array([0, 1, 1, 0, 2])
    x0, gradient = problem(1, steps)
    worker = TorchWorker(x0, groups, base, options)
    history = run(
        x0, gradient, steps=steps, workers=1, lr=wavy, base=base, base_options=options, groups=groups, tau=None
    )
    for step in range(steps):
        worker.step(gradient(0, step, worker.x), [wavy(0, step, j) for j in range(3)])
        close(history[step + 1].x[0], worker.x)
    assert not any(s.outer for s in history)
    assert all(np.array_equal(s.anchor, x0) and not s.v.any() for s in history)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(BASES)), seed=st.integers(0, 999), workers=st.integers(1, 4), tau=st.integers(1, 6),
    steps=st.integers(0, 30), warmup_steps=st.integers(0, 7), alpha=st.sampled_from([0.5, 0.7, 1.0, 1.3]),
    beta=st.sampled_from([0.0, 0.5, 0.9]), nesterov=st.booleans(), scale_by_lr=st.booleans(),
    buffers=st.sampled_from(["maintain", "reset", "average"]), gradients=st.sampled_from(["local", "all"]),
    n_groups=st.integers(1, 2), unequal=st.booleans(),
)  # fmt: skip
def test_whole_is_outer_torch_sgd(
    name: str, seed: int, workers: int, steps: int, warmup_steps: int, n_groups: int, unequal: bool, **config: Any
) -> None:
    base, options = BASES[name]
    x0, gradient = problem(workers, steps, seed)
    groups = np.arange(D) % n_groups

    def lr(worker: int, step: int, group: int) -> float:
        return (wavy if unequal and step >= warmup_steps else common)(worker, step, group)

    config |= {"steps": steps, "workers": workers, "groups": groups, "warmup_steps": warmup_steps, "lr": lr}
    history = run(x0, gradient, base=base, base_options=options, **config)
    expected = torch_slowmo(x0, gradient, base=base, options=options, **config)
    close(xs(history), expected, 1e-12)
    assert [s.step for s in history] == list(range(steps + 1))
    for s in history[1:]:
        done = s.step - warmup_steps
        assert s.outer == (done > 0 and done % config["tau"] == 0)
        if s.outer or done == 0:
            assert np.array_equal(s.x, np.tile(s.anchor, (workers, 1)))


# Special cases of algorithm.md


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("workers", [1, 3, 8])
def test_averaged_heavy_ball(workers: int, decay: bool) -> None:
    steps, momentum = 200, 0.9
    x0, gradient = problem(workers, steps)

    def lr(worker: int, step: int, group: int) -> float:
        return 0.05 * (0.1 ** (step // 80) if decay else 1)

    history = run(x0, gradient, steps=steps, workers=workers, lr=lr, tau=1, alpha=1, beta=momentum)
    torch_one = TorchWorker(x0, np.zeros(D, dtype=np.int64), "sgd", {"momentum": momentum})
    for step in range(steps):
        mean = np.mean([gradient(i, step, torch_one.x) for i in range(workers)], axis=0)
        torch_one.step(mean, [lr(0, step, 0)])
        close(history[step + 1].x, np.tile(torch_one.x, (workers, 1)))


def test_local_sgd_is_plain_averaging() -> None:
    m, tau, steps = 4, 5, 43
    x0, gradient = problem(m, steps)
    history = run(x0, gradient, steps=steps, workers=m, lr=wavy, tau=tau, alpha=1, beta=0)
    x = [x0.copy() for _ in range(m)]
    for step in range(steps):
        for i in range(m):
            x[i] = x[i] - wavy(i, step, 0) * gradient(i, step, x[i])
        if step % tau == tau - 1:
            x = [sum(x) / m] * m
        close(history[step + 1].x, x)


def blocks(x: Array, gradient: Gradient, m: int, tau: int, t: int, lr: Rate) -> Array:
    """(d,): the mean of m workers after tau SGD steps each from x (d,), block t."""
    ends = []
    for i in range(m):
        y = x
        for step in range(t * tau, (t + 1) * tau):
            y = y - lr(i, step, 0) * gradient(i, step, y)
        ends.append(y)
    mean: Array = np.array(ends).mean(axis=0)
    return mean


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
def test_lookahead(alpha: float) -> None:
    """slow <- slow + alpha (fast - slow), one worker (Zhang et al. 2019)."""
    tau, x0_gradient = 6, problem(1, 60)
    slow, gradient = x0_gradient
    history = run(slow, gradient, steps=60, workers=1, lr=common, tau=tau, alpha=alpha, beta=0)
    for t in range(10):
        slow = slow + alpha * (blocks(slow, gradient, 1, tau, t, common) - slow)
        close(history[(t + 1) * tau].x[0], slow)


@pytest.mark.parametrize("kind", ["constant", "changing"])
def test_bmuf_classical(kind: str) -> None:
    """Chen & Huo 2016: G = mean - W; D <- eta D + zeta G; W <- W + D. Exact if the rate is constant or unscaled."""
    m, tau, zeta, eta = 3, 4, 0.8, 0.6

    def constant(worker: int, step: int, group: int) -> float:
        return 0.07

    lr: Rate = constant if kind == "constant" else wavy
    x0, gradient = problem(m, 80)
    settings_ = {"steps": 80, "workers": m, "lr": lr, "tau": tau, "alpha": zeta, "beta": eta}
    plain: dict[bool, Array] = {s: xs(run(x0, gradient, scale_by_lr=s, **settings_)) for s in (True, False)}
    w, d = x0, np.zeros(D)
    for t in range(20):
        d = eta * d + zeta * (blocks(w, gradient, m, tau, t, lr) - w)
        w = w + d
        close(plain[False][(t + 1) * tau, 0], w)
        if kind == "constant":
            close(plain[True][(t + 1) * tau, 0], w)
    if kind == "changing":
        assert np.abs(plain[True][-1] - plain[False][-1]).max() > 1e-3


def test_diloco() -> None:
    """Douillard et al. 2023: AdamW inside, kept; SGD(nesterov=True, lr=.7, momentum=.9) on Delta outside."""
    m, tau, steps = 4, 10, 120
    x0, gradient = problem(m, steps)
    history = run(x0, gradient, steps=steps, workers=m, lr=common, base="adamw", tau=tau, alpha=0.7, beta=0.9,
                  nesterov=True, scale_by_lr=False)  # fmt: skip
    group = np.zeros(D, dtype=np.int64)
    team = [TorchWorker(x0, group, "adamw", {}) for _ in range(m)]
    anchor = torch.nn.Parameter(torch.tensor(x0))
    outer = torch.optim.SGD([anchor], lr=0.7, momentum=0.9, nesterov=True)
    for step in range(steps):
        for i, w in enumerate(team):
            w.step(gradient(i, step, w.x), [common(i, step, 0)])
        if step % tau == tau - 1:
            anchor.grad = anchor.detach() - torch.tensor(np.mean([w.x for w in team], axis=0))
            outer.step()
            for w in team:
                w.set(anchor.detach().numpy())
        close(history[step + 1].x, [w.x for w in team])


# By hand


def pull(worker: int, step: int, x: Array) -> Array:
    """Worker 0: gradient x, worker 1: 2 x."""
    return (worker + 1) * x


def halving(worker: int, step: int, group: int) -> float:
    return 0.5 if step < 2 else 0.25


BY_HAND: dict[str, tuple[dict[str, Any], list[float], list[float]]] = {
    # Block 0 at rate 1/2 from 1: worker 0 at 1/4, worker 1 at 0, mean .125, Delta = .875.
    # u_1 = .875 / .5 = 1.75; x = 1 - .5 * .5 * 1.75 = .5625.
    # Block 1 at rate 1/4: worker 0 at .75^2 x = .31640625, worker 1 at x / 4 = .140625, Delta = .333984375.
    # u_2 = .5 * 1.75 + .333984375 / .25 = 2.2109375; x = .5625 - .5 * .25 * u_2; v_2 = .25 u_2.
    "paper": ({}, [0.5625, 0.2861328125], [0.875, 0.552734375]),
    # v_2 = .5 * .875 + .333984375
    "unscaled": ({"scale_by_lr": False}, [0.5625, 0.1767578125], [0.875, 0.771484375]),
    # x = 1 - .5 (.5 * .875 + .875) = .34375. Block 1: mean .40625 x, so Delta = .59375 * .34375 = .2041015625.
    # v_2 = .5 * .5 * .875 + Delta = .4228515625; x = .34375 - .5 (.5 v_2 + Delta).
    "nesterov": ({"nesterov": True}, [0.34375, 0.135986328125], [0.875, 0.4228515625]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    """Powers of two throughout: exact."""
    options, x, v = BY_HAND[name]
    history = run(np.ones(1), pull, steps=5, workers=2, lr=halving, tau=2, alpha=0.5, beta=0.5, **options)
    assert [s.outer for s in history] == [False, False, True, False, True, False]
    assert history[1].x.tolist() == [[0.5], [0.0]]
    assert [history[2].x.tolist(), history[4].x.tolist()] == [[[x[0]], [x[0]]], [[x[1]], [x[1]]]]
    assert [s.anchor.item() for s in history] == [1, 1, x[0], x[0], x[1], x[1]]
    assert [s.v.item() for s in history] == [0, 0, v[0], v[0], v[1], v[1]]
    assert [s.gamma.item() for s in history] == [0, 0, 0.5, 0.5, 0.25, 0.25]


def test_gamma_is_the_mean_over_steps_and_workers() -> None:
    """Rates 1/2 and 1 (worker 0), 1/4 and 1/4 (worker 1), constant gradient 1: gamma = 1/2 = Delta / tau; v = Delta.
    The second block has all rates 1/4, so v_2 = .5 * (.25 / .5) * 1 + .5."""
    table = {(0, 0): 0.5, (0, 1): 1.0, (1, 0): 0.25, (1, 1): 0.25}
    history = run(
        np.zeros(1), lambda i, s, x: np.ones(1), steps=4, workers=2, tau=2, lr=lambda i, s, g: table.get((i, s), 0.25)
    )
    assert [h.gamma.item() for h in history] == [0, 0, 0.5, 0.5, 0.25]
    assert [h.v.item() for h in history] == [0, 0, 1.0, 1.0, 0.75]
    assert [h.anchor.item() for h in history] == [0, 0, -1.0, -1.0, -1.75]


def test_gamma_zero_carries_nothing_and_keeps_v() -> None:
    """tau 1, constant gradient 1, rates 1/2, 0, 1/4: v is .5, then kept, then .5 * (.25 / .5) * .5 + .25 = .375."""
    rates = [0.0, 0.5, 0.0, 0.25]
    history = run(np.zeros(1), lambda i, s, x: np.ones(1), steps=4, workers=2, tau=1, lr=lambda i, s, g: rates[s])
    assert [h.gamma.item() for h in history[1:]] == rates
    assert [h.v.item() for h in history[1:]] == [0, 0.5, 0.5, 0.375]
    assert [h.anchor.item() for h in history[1:]] == [0, -0.5, -0.5, -0.875]


@pytest.mark.parametrize(("nesterov", "scale_by_lr", "x", "v"), [
    (False, True, 0.0, 0.5),  # -.5 - Delta
    (True, True, 0.0, 0.5),  # v_{t+1} = Delta: -.75 - (.5 Delta + Delta) = 0
    (False, False, -0.25, -0.25),  # no convention: v = .5 * .5 + Delta = -.25; x = -.5 - v
    (True, False, -0.125, -0.25),  # -.75 - (.5 * -.25 - .5)
])  # fmt: skip
def test_gamma_zero_with_a_delta(nesterov: bool, scale_by_lr: bool, x: float, v: float) -> None:
    """Rates of opposite sign cancel: gamma is 0, Delta is not. Block 0: rate 1/2, gradients 1 and 1, Delta .5, x -.5
    (Nesterov: -.75). Block 1: rates 1/2 and -1/2, gradients 1 and 3: Delta = (1/2 - 3/2) / 2 = -.5."""
    history = run(
        np.zeros(1), lambda i, s, x: np.full(1, 1.0 + 2 * i * s), steps=2, workers=2, tau=1, beta=0.5,
        nesterov=nesterov, scale_by_lr=scale_by_lr, lr=lambda i, s, g: 0.5 * (-1.0) ** (i * s),
    )  # fmt: skip
    assert history[1].anchor.item() == (-0.75 if nesterov else -0.5)
    assert (history[2].gamma.item(), history[2].anchor.item(), history[2].v.item()) == (0, x, v)


@pytest.mark.parametrize(("strategy", "moved"), [
    ("maintain", [1.75, 5.25]),  # .5 (1.5, 4.5) + (1, 3)
    ("reset", [1.0, 3.0]),  # the gradients alone
    ("average", [2.5, 4.5]),  # .5 (3, 3) + (1, 3)
])  # fmt: skip
def test_line_2_by_hand(strategy: str, moved: list[float]) -> None:
    """SGD momentum 1/2, rate 1, constant gradients 1 and 3, tau 2, plain averaging. Block 0: steps of (1, 3), then
    (1.5, 4.5), the buffers; 5 on average. Then the first step of block 1, from -5."""
    history = run(
        np.zeros(1), lambda i, s, x: np.full(1, 1.0 + 2 * i), steps=3, workers=2, lr=1.0, tau=2, alpha=1, beta=0,
        base_options={"momentum": 0.5}, buffers=strategy,
    )  # fmt: skip
    assert history[2].anchor.item() == -5
    assert (-5 - history[3].x[:, 0]).tolist() == moved


# Groups, warm-up, copies, errors


def test_groups_are_independent() -> None:
    """A coordinate-wise problem: two groups together are each alone, to the bit."""
    x0, gradient = problem(3, 40)
    groups = np.array([0, 1, 1, 0, 1])
    common_ = {"steps": 40, "workers": 3, "tau": 4, "alpha": 0.9, "beta": 0.7, "base": "adam"}
    both = run(x0, gradient, lr=wavy, groups=groups, **common_)
    for j in (0, 1):
        c = groups == j

        def part(i: int, step: int, x: Array, c: NDArray[np.bool_] = c) -> Array:
            full = np.zeros(D)
            full[c] = x
            return gradient(i, step, full)[c]

        alone = run(x0[c], part, lr=lambda i, s, g, j=j: wavy(i, s, j), **common_)
        for a, b in zip(alone, both, strict=True):
            assert np.array_equal(a.x, b.x[:, c])
            assert np.array_equal(a.v, b.v[c])
            assert a.gamma[0] == b.gamma[j]


def test_warmup_then_the_algorithm() -> None:
    """Warm-up is averaged SGD; what follows is a run of its own from there (SGD without momentum: no state)."""
    m, warm, tau = 3, 7, 4
    x0, gradient = problem(m, 40)
    whole = run(x0, gradient, steps=40, workers=m, lr=common, tau=tau, warmup_steps=warm)
    x = x0
    for step in range(warm):
        x = x - common(0, step, 0) * np.mean([gradient(i, step, x) for i in range(m)], axis=0)
    close(whole[warm].x, np.tile(x, (m, 1)))
    assert not any(s.outer or s.gamma.any() for s in whole[: warm + tau])
    assert np.array_equal(whole[warm - 1].anchor, x0)
    assert np.array_equal(whole[warm].anchor, whole[warm].x[0])
    rest = run(
        whole[warm].x[0], lambda i, s, x: gradient(i, s + warm, x), steps=40 - warm, workers=m,
        lr=lambda i, s, g: common(i, s + warm, g), tau=tau,
    )  # fmt: skip
    for a, b in zip(rest, whole[warm:], strict=True):
        assert np.array_equal(a.x, b.x)
        assert np.array_equal(a.v, b.v)
        assert a.outer == b.outer


def test_snapshots_are_copies() -> None:
    x0, gradient = problem(2, 8)
    start = x0.copy()

    def spoil(i: int, step: int, x: Array) -> Array:
        g = gradient(i, step, x)
        x[:] = np.nan  # the oracle's own x is out of reach
        return g

    history = run(x0, spoil, steps=8, workers=2, lr=0.1, tau=2)
    arrays = [a for s in history for a in (s.x, s.anchor, s.v, s.gamma)] + [x0]
    assert all(np.isfinite(a).all() and a.dtype == np.float64 for a in arrays)
    assert not any(np.shares_memory(a, b) for k, a in enumerate(arrays) for b in arrays[:k])
    assert np.array_equal(x0, start)
    assert [(s.x.shape, s.anchor.shape, s.v.shape, s.gamma.shape) for s in history] == [((2, D), (D,), (D,), (1,))] * 9


@pytest.mark.parametrize(("bad", "message"), [
    ({"workers": 0}, "positive"), ({"tau": 0}, "positive"), ({"steps": -1}, "negative"), ({"warmup_steps": -1}, "neg"),
    ({"base": "lion"}, "unknown"), ({"buffers": "zero"}, "unknown"), ({"gradients": "some"}, "unknown"),
    ({"groups": np.zeros(D + 1, dtype=np.int64)}, "groups"), ({"groups": np.full(D, -1)}, "groups"),
    ({"base_options": {"nesterov": True}}, "Nesterov"), ({"lr": wavy, "warmup_steps": 2}, "workers differ"),
    ({"gradient": lambda i, s, x: None}, "gradient must"),
])  # fmt: skip
def test_nonsense_is_refused(bad: dict[str, Any], message: str) -> None:
    x0, gradient = problem(2, 8)
    arguments: dict[str, Any] = {"gradient": gradient, "steps": 8, "workers": 2, "lr": 0.1} | bad
    with pytest.raises(ValueError, match=message):
        run(x0, **arguments)


# The theorem


def mean_squared_gradient(total: int, beta: float, workers: int = 8, seeds: int = 16) -> float:
    """Of f = sum x^2 / (1 + x^2), d = 20, at the workers' mean, over all steps; algorithm.md, "The theorem".
    f is a sum over coordinates and SGD works on each, so the seeds are simply more coordinates."""
    linear = np.random.default_rng(0).normal(size=(workers, 20))
    linear = np.tile(linear - linear.mean(axis=0), (1, seeds))
    noise = np.random.default_rng(1)

    def gradient(i: int, step: int, x: Array) -> Array:
        g: Array = 2 * x / (1 + x * x) ** 2 + linear[i] + noise.standard_normal(x.size)
        return g

    rate = (1 - beta) * float(np.sqrt(workers / total))
    history = run(np.full(20 * seeds, 0.8), gradient, steps=total, workers=workers, lr=rate, tau=8, beta=beta)
    x = np.array([s.x.mean(axis=0) for s in history[:-1]])
    return float(((2 * x / (1 + x * x) ** 2) ** 2).sum() / (total * seeds))


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "powers"), [(0.0, range(10, 14)), (0.6, range(9, 13))])
def test_theorem_slope_in_steps(beta: float, powers: range) -> None:
    """The bound is a / sqrt(m K) + b / K, both positive, b from the drift inside blocks and the ramp-up of the
    momentum. So the slope lies between -1 and -1/2 and comes to -1/2 from below; at these small K the second term is
    still seen. Seen, from one power of two to the next (noise about .005, seeds fixed):
    beta 0, K from 2^9 to 2^14: -.84 -.74 -.65 -.59 -.55; beta .6: -.69 -.63 -.59 -.55 -.53. With 3 noise seeds at
    2^15 and 2^16: -.54 -.52 and -.53 -.51. The test stops earlier, to be quick.
    """
    values = [mean_squared_gradient(2**p, beta) for p in powers]
    slopes = np.diff(np.log2(values))
    assert np.all((slopes > -1) & (slopes < -0.49))  # .01 for the noise
    assert np.all(np.diff(slopes) > 0)  # on its way to -1/2 ...
    assert slopes[-1] > -0.62  # ... and nearly there
