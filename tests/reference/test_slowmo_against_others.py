"""Compare the NumPy oracle with torch's optimizers and published formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from reference.slowmo import Snapshot, run
from support.quadratics import Array, D, Gradient, Rate, close, common, problem, wavy
from support.sample import examples


def xs(history: list[Snapshot]) -> Array:
    """Return the parameters of all snapshots, (steps + 1, m, d)."""
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
    nesterov: bool = False, scale_by_lr: bool = True, inner_state: str = "maintain", gradients: str = "local",
    warmup_steps: int = 0,
) -> Array:  # fmt: skip
    """Run algorithm.md's oracle: an outer torch SGD(lr=alpha, momentum=beta, nesterov) on Delta, its momentum buffer
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
            if inner_state == "reset" and tau is not None:
                for w in team:
                    w.optimizer = w.make()
            elif inner_state == "average" and tau is not None:
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


# The inner optimizers and the whole algorithm, against torch


@pytest.mark.slow
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


@examples(150)
@given(
    name=st.sampled_from(sorted(BASES)), seed=st.integers(0, 999), workers=st.integers(1, 4), tau=st.integers(1, 6),
    steps=st.integers(0, 30), warmup_steps=st.integers(0, 7), alpha=st.sampled_from([0.5, 0.7, 1.0, 1.3]),
    beta=st.sampled_from([0.0, 0.5, 0.9]), nesterov=st.booleans(), scale_by_lr=st.booleans(),
    inner_state=st.sampled_from(["maintain", "reset", "average"]), gradients=st.sampled_from(["local", "all"]),
    n_groups=st.integers(1, 2), unequal=st.booleans(),
)  # fmt: skip
@pytest.mark.slow
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
    """Return the mean (d,) of m workers after tau SGD steps each from x (d,), in block t."""
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
