"""Topologies against what they promise, computed in another way; push-sum weights; the command that shows both."""

from __future__ import annotations

import builtins
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_slowmo import cli, pushsum
from hvd_slowmo.graphs import NAMED, Array
from hvd_slowmo.topology import (
    consecutive_nodes,
    moves_weights,
    out_degree,
    spectral_gap,
    steps_to_consensus,
    topology,
)

SIZES = range(1, 17)
CASES = [(name, m) for name in NAMED for m in SIZES if not (name == "bipartite" and m % 2 and m > 1)]
POWERS = (1, 2, 4, 8, 16, 32)


def valid(name: str, m: int) -> bool:
    return name != "bipartite" or m % 2 == 0 or m == 1


def mixed(array: Array, x: Array, steps: int) -> Array:
    """De-biased values after so many steps, message by message. x: (m,)."""
    period, m, _ = array.shape
    x, w = x.copy(), np.ones(m)
    for step in range(steps):
        new_x, new_w = np.zeros(m), np.zeros(m)
        for i in range(m):
            for j in range(m):
                new_x[i] += array[step % period, i, j] * x[j]
                new_w[i] += array[step % period, i, j] * w[j]
        x, w = new_x, new_w
    z: Array = x / w
    return z


# What every topology must be


@pytest.mark.parametrize(("name", "m"), CASES)
def test_named(name: str, m: int) -> None:
    p = topology(name, m)
    assert p.shape[1:] == (m, m)
    assert p.dtype == np.float64
    assert p.flags.c_contiguous
    assert not p.flags.writeable
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-15)
    assert (p >= 0).all()
    assert (np.diagonal(p, axis1=1, axis2=2) > 0).all()
    assert moves_weights(p) == (name == "star" and m > 1)
    if name in ("bipartite", "ring", "full"):
        assert np.array_equal(p, p.transpose(0, 2, 1))
        assert np.array_equal(topology(name, m, symmetric=True), p)
    if m == 1:
        assert np.array_equal(p, [[[1.0]]])


@pytest.mark.parametrize(("name", "m"), CASES)
def test_everyone_hears_of_everyone(name: str, m: int) -> None:
    """By passing on who was heard of, worker by worker."""
    p = topology(name, m)
    heard = [{i} for i in range(m)]
    for step in range(m * len(p)):
        heard = [set().union(*(heard[j] for j in range(m) if p[step % len(p), i, j] > 0)) for i in range(m)]
    assert heard == [set(range(m))] * m


@pytest.mark.parametrize("m", SIZES)
def test_who_sends_to_whom(m: int) -> None:
    """(step, from, to) of all messages, from the descriptions."""

    def messages(name: str) -> set[tuple[int, int, int]]:
        p = topology(name, m)
        return {(int(k), int(j), int(i)) for k, i, j in np.argwhere(p > 0) if i != j}

    hops = [2**k for k in range(math.floor(math.log2(m - 1)) + 1)] if m > 1 else []
    every = [(j, (j + h) % m) for j in range(m) for h in hops]
    assert messages("exponential") == {(hops.index((i - j) % m), j, i) for j, i in every}
    assert messages("complete") == {(0, j, i) for j, i in every}
    assert messages("full") == {(0, j, i) for j in range(m) for i in range(m) if i != j}
    assert messages("ring") == {(0, j, (j + h) % m) for j in range(m) for h in (1, -1) if (j + h) % m != j}
    assert messages("star") == {(0, j, 0) for j in range(1, m)} | {(1, 0, i) for i in range(1, m)}
    if m % 2 == 0:
        swaps = messages("bipartite")
        assert swaps == {(k, i, j) for k, j, i in swaps}
        assert all((i + j) % 2 for _, j, i in swaps)  # odd with even
        for k in range(len(topology("bipartite", m))):
            assert sorted(j for step, j, _ in swaps if step == k) == list(range(m))
            assert (k, 1, (1 + 2 ** (k + 1) - 1) % m) in swaps


@pytest.mark.parametrize(("name", "m"), CASES)
def test_messages_per_worker_and_step(name: str, m: int) -> None:
    degrees = out_degree(topology(name, m))
    hops = math.floor(math.log2(m - 1)) + 1 if m > 1 else 0
    usual = {"exponential": 1, "bipartite": 1, "complete": hops, "ring": min(2, m - 1), "full": m - 1}
    if name == "star" and m > 1:
        assert degrees.tolist() == [[0, *[1] * (m - 1)], [m - 1, *[0] * (m - 1)]]
    else:
        assert (degrees == min(usual.get(name, 0), m - 1)).all()


# Consensus


@pytest.mark.parametrize("m", POWERS)
@pytest.mark.parametrize("name", ["exponential", "bipartite"])
def test_powers_of_two_meet_the_mean(name: str, m: int) -> None:
    """After log2 m steps and not before, whichever step of the period is the first; exact in binary fractions."""
    p, x = topology(name, m), np.random.default_rng(0).integers(0, 1000, m).astype(float)
    log = int(math.log2(m))
    assert len(p) == max(log, 1)
    assert np.array_equal(mixed(p, x, log), np.full(m, x.mean()))
    assert steps_to_consensus(p, 1e-12) == log
    assert spectral_gap(p) == pytest.approx(1, abs=1e-12)
    for first in range(len(p)):
        turned = np.roll(p, -first, axis=0)
        if name == "exponential":
            assert np.array_equal(mixed(turned, x, log), np.full(m, x.mean()))


@pytest.mark.parametrize(("name", "m"), CASES)
def test_geometric_decay(name: str, m: int) -> None:
    """The distance from the mean shrinks over a period by 1 - the spectral gap, in the end."""
    p = topology(name, m)
    gap = spectral_gap(p)
    assert 0 < gap <= 1
    n = min(40, 1 + int(math.log(1e-9) / math.log(max(1 - gap, 1e-9))))
    x = np.random.default_rng(m).normal(size=m)
    away = [np.abs(mixed(p, x, periods * len(p)) - x.mean()).max() for periods in (0, n)]
    if gap > 1 - 1e-9:
        assert away[1] < 1e-12
    else:
        assert away[1] ** (1 / n) == pytest.approx(1 - gap, rel=0.5, abs=0.1)
        assert away[1] <= 20 * (1 - gap) ** n


@pytest.mark.parametrize(("name", "m"), [case for case in CASES if case[1] > 1])
def test_spectral_gap_by_power_iteration(name: str, m: int) -> None:
    """|lambda_2| as the growth of the powers of the product, without its projection on the stationary vector."""
    p = topology(name, m)
    product = np.eye(m)
    for matrix in p:
        product = matrix @ product
    stationary = np.linalg.matrix_power(product, 3000)[:, 0]
    rest = product - np.outer(stationary, np.ones(m))
    growth = np.linalg.norm(np.linalg.matrix_power(rest, 64), 2) ** (1 / 64)
    assert 1 - spectral_gap(p) == pytest.approx(growth, rel=0.05, abs=1e-8)


def test_spectral_gap_in_closed_form() -> None:
    for m in range(3, 17):
        assert spectral_gap(topology("ring", m)) == pytest.approx(1 - (1 + 2 * math.cos(2 * math.pi / m)) / 3)
        # Over gather and scatter, two others that differ keep half their difference.
        assert spectral_gap(topology("star", m)) == pytest.approx(0.5)
    assert spectral_gap(topology("exponential", 3)) == pytest.approx(0.75)  # |1 + w|^2 / 4 for w^3 = 1, squared


def worst(p: Array, steps: int) -> float:
    """Over starts of 0 and 1, all of them."""
    m = p.shape[1]
    starts = [np.array([bits >> i & 1 for i in range(m)], dtype=float) for bits in range(2**m)]
    return max(float(np.abs(mixed(p, x, steps) - x.mean()).max()) for x in starts)


@pytest.mark.parametrize(("name", "m"), [(name, m) for name, m in CASES if m <= 5])
@pytest.mark.parametrize("tolerance", [0.3, 0.02])
def test_steps_to_consensus_by_trying_all_starts(name: str, m: int, tolerance: float) -> None:
    p = topology(name, m)
    steps = steps_to_consensus(p, tolerance)
    assert worst(p, steps) <= tolerance
    assert steps == 0 or worst(p, steps - 1) > tolerance


def test_steps_to_consensus_of_a_long_ring() -> None:
    """Found without walking there."""
    assert 100_000 < steps_to_consensus(topology("ring", 500)) < 200_000
    assert [steps_to_consensus(topology("exponential", m)) for m in (12, 64)] == [19, 6]


@pytest.mark.parametrize("tolerance", [0, 1, -1e-3, math.nan])
def test_tolerance_that_cannot_be(tolerance: float) -> None:
    with pytest.raises(ValueError, match="`tolerance` must be a number"):
        steps_to_consensus(topology("ring", 5), tolerance)


def test_steps_to_consensus_that_never_comes() -> None:
    with pytest.raises(ValueError, match="connected"):
        steps_to_consensus(np.eye(3)[np.newaxis])


# Resolving and refusing


def test_defaults() -> None:
    for m in SIZES:
        assert np.array_equal(topology(None, m), topology("exponential", m))
        even = "ring" if m % 2 else "bipartite"
        assert np.array_equal(topology(None, m, symmetric=True), topology(even, m))


def lazy(m: int) -> list[list[float]]:
    return [[0.9 * (i == j) + 0.1 * (i == (j + 1) % m) for j in range(m)] for i in range(m)]


def test_a_users_own() -> None:
    assert np.array_equal(topology(lazy, 5), np.array([lazy(5)]))
    assert np.array_equal(topology(lazy(5), 5), np.array([lazy(5)]))
    mine = np.array([lazy(5), np.eye(5)])
    p = topology(mine, 5)
    assert np.array_equal(p, mine)
    mine[:] = 0  # a copy
    assert p.any()
    assert np.array_equal(topology(np.eye(1, dtype=int), 1), [[[1.0]]])
    assert mine.flags.writeable


def with_entries(m: int, entries: dict[tuple[int, int, int], float]) -> Array:
    p = np.array(NAMED["exponential"](m))
    for place, value in entries.items():
        p[place] = value
    return p


ASYMMETRIC = {(0, 0, 0): 0.4, (0, 1, 0): 0.6}
REFUSED: list[tuple[Any, int, dict[str, Any], type[Exception], str]] = [
    ("hypercube", 4, {}, ValueError, r"one of 'exponential'.*Received: topology='hypercube'"),
    ("bipartite", 5, {}, ValueError, r"must be even\. Received: 5 workers\. 'ring'"),
    ("exponential", 5, {"symmetric": True}, ValueError, r"must be symmetric for D-PSGD.*P\[0, 1, 0\] = 0.5.*'ring'"),
    ("star", 3, {"symmetric": True}, ValueError, "must be symmetric"),
    ("ring", 0, {}, ValueError, "`workers` must be a positive integer. Received: workers=0"),
    ("ring", 2.5, {}, TypeError, "`workers` must be a positive integer"),
    (np.eye(3), 4, {}, ValueError, r"shape \(period, 4, 4\).*Received: shape \(3, 3\)"),
    (np.zeros((0, 4, 4)), 4, {}, ValueError, r"Received: shape \(0, 4, 4\)"),
    (np.ones(4), 4, {}, ValueError, "shape"),
    ([[1.0, 0.0], [1.0]], 2, {}, ValueError, "rows that differ"),
    ([["a", "b"], ["c", "d"]], 2, {}, TypeError, "array of numbers"),
    (np.eye(2, dtype=complex), 2, {}, TypeError, "array of numbers"),
    (lambda m: None, 2, {}, TypeError, r"function <lambda> must be an array of numbers.*None"),
    (lambda m: lazy(3), 2, {}, ValueError, r"for 2 workers.*shape \(3, 3\)"),
    (with_entries(4, {(1, 2, 3): math.nan}), 4, {}, ValueError, r"finite numbers. Received: P\[1, 2, 3\] = nan"),
    (with_entries(4, {(0, 0, 0): 1.5, (0, 1, 0): -0.5}), 4, {}, ValueError, r"negative.*P\[0, 1, 0\] = -0.5"),
    (with_entries(4, {(1, 0, 2): 0.6}), 4, {}, ValueError, r"P\[1, :, 2\] sums to 1.1\. Transpose"),
    (np.transpose(NAMED["star"](3), (0, 2, 1)), 3, {}, ValueError, "columns that sum to 1"),
    (np.full((3, 3), 1 / 3, dtype=np.float32), 3, {}, ValueError, "in float64"),
    (with_entries(4, {(1, 2, 2): 0, (1, 0, 2): 1}), 4, {}, ValueError, r"P\[1, 2, 2\] = 0"),
    (with_entries(4, ASYMMETRIC), 4, {"symmetric": True}, ValueError, r"P\[0, 0, 1\] = 0 and P\[0, 1, 0\] = 0.6"),
    (np.eye(3), 3, {}, ValueError, "worker 0 never hears of worker 1"),
    (NAMED["exponential"](4)[1:], 4, {}, ValueError, "worker 0 never hears of worker 1.*in one of the 1 step"),
    ([[0.5, 0], [0.5, 1]], 2, {}, ValueError, "worker 0 never hears of worker 1"),
    ("ring", 4, {"nodes": [[0, 1, 2], [3]]}, ValueError, "nodes of 3, 1 workers"),
    ("ring", 4, {"nodes": []}, ValueError, "nodes of one size"),
    ("ring", 4, {"nodes": [[0, 1], [2, 2]]}, ValueError, "each of the ranks 0 to 3 once"),
    ("ring", 4, {"nodes": [[0], [1]]}, ValueError, "each of the ranks 0 to 3 once"),
    ("bipartite", 6, {"nodes": [[0, 1], [2, 3], [4, 5]]}, ValueError, "Received: 3 workers"),
]


@pytest.mark.parametrize(("spec", "m", "options", "error", "message"), REFUSED)
def test_refused(spec: Any, m: int, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        topology(spec, m, **options)


def test_float32_in_float64_is_the_cure() -> None:
    p = np.full((1, 3, 3), 1 / 3, dtype=np.float32).astype(np.float64)
    topology(p / p.sum(axis=-2, keepdims=True), 3)


# Nodes


@pytest.mark.parametrize("name", list(NAMED))
@pytest.mark.parametrize(("n", "size"), [(1, 1), (1, 4), (2, 2), (4, 3), (3, 1), (6, 2)])
def test_nodes(name: str, n: int, size: int) -> None:
    if not valid(name, n):
        return
    nodes = consecutive_nodes(n * size, size)
    over_nodes, p = topology(name, n), topology(name, n * size, nodes=nodes)
    assert np.array_equal(p, np.kron(over_nodes, np.eye(size)))
    assert not p.flags.writeable
    # The workers of a node stay equal, to the bit, and are what the nodes alone would be.
    x = np.random.default_rng(0).normal(size=n)
    z, alone = mixed(p, np.repeat(x, size), 7), mixed(over_nodes, x, 7)
    assert np.array_equal(z, np.repeat(alone, size))
    assert np.array_equal(out_degree(p), np.repeat(out_degree(over_nodes), size, axis=1))


def test_nodes_whose_ranks_are_not_consecutive() -> None:
    p = topology("exponential", 4, nodes=[[0, 2], [3, 1]])
    assert np.argwhere(p[0] - np.eye(4) / 2 > 0).tolist() == [[0, 3], [1, 2], [2, 1], [3, 0]]


def test_nodes_must_divide_the_workers() -> None:
    assert consecutive_nodes(6, 3) == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="7 workers are not a whole number of nodes of 2"):
        consecutive_nodes(7, 2)


# Push-sum weights


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=st.sampled_from(CASES), steps=st.integers(0, 30), start=st.integers(0, 9))
def test_weights_are_conserved(case: tuple[str, int], steps: int, start: int) -> None:
    p = topology(*case)
    parts = pushsum.parts(p)
    assert np.array_equal(parts.sent + parts.kept * np.eye(p.shape[1]), p)
    m = p.shape[1]
    prompt = late = np.ones((m, 1))
    arriving = np.zeros((m, 1))
    for step in range(start, start + steps):
        k = step % len(p)
        sent = pushsum.in_flight(parts.kept[k], late)
        np.testing.assert_allclose(pushsum.mixed(parts.kept[k], parts.sent[k], prompt), p[k] @ prompt, rtol=1e-14)
        prompt = pushsum.mixed(parts.kept[k], parts.sent[k], prompt)
        late, arriving = pushsum.mixed_late(parts.kept[k], parts.sent[k], late, arriving)
        assert sent.sum() == pytest.approx(arriving.sum(), abs=1e-12)
        assert prompt.sum() == pytest.approx(m)
        assert late.sum() + arriving.sum() == pytest.approx(m)
        assert prompt.min() > 0
        assert late.min() > 0


def test_the_star_moves_weights() -> None:
    for m in range(2, 17):
        p = topology("star", m)
        parts = pushsum.parts(p)
        w = pushsum.mixed(parts.kept[0], parts.sent[0], np.ones((m, 1)))
        np.testing.assert_allclose(w[:, 0], [(m + 1) / 2, *[1 / 2] * (m - 1)])


def test_weights_run_on_torch() -> None:
    parts = pushsum.parts(topology("star", 4))
    w, arriving = np.ones((4, 1)), np.zeros((4, 1))
    w_torch, arriving_torch = torch.ones(4, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    for step in range(9):
        kept, sent = parts.kept[step % 2], parts.sent[step % 2]
        w, arriving = pushsum.mixed_late(kept, sent, w, arriving)
        w_torch, arriving_torch = pushsum.mixed_late(torch.tensor(kept), torch.tensor(sent), w_torch, arriving_torch)
        np.testing.assert_allclose(w_torch.numpy(), w, rtol=1e-15)


@pytest.mark.slow  # for TensorFlow's import
def test_weights_run_traced() -> None:
    import tensorflow as tf

    array = topology("star", 4)
    parts = pushsum.parts(array)

    @tf.function
    def late(step: Any, w: Any, arriving: Any) -> Any:
        k = step % len(array)
        return pushsum.mixed_late(tf.gather(parts.kept, k), tf.gather(parts.sent, k), w, arriving)

    w, arriving = np.ones((4, 1)), np.zeros((4, 1))
    traced = (tf.constant(w), tf.constant(arriving))
    for step in range(9):
        w, arriving = pushsum.mixed_late(parts.kept[step % 2], parts.sent[step % 2], w, arriving)
        traced = late(tf.constant(step), *traced)
        np.testing.assert_allclose([t.numpy() for t in traced], [w, arriving], rtol=1e-15)


def test_base_step_in_terms_of_x() -> None:
    rng = np.random.default_rng(0)
    x, z_new = rng.normal(size=50), rng.normal(size=50)
    assert np.array_equal(pushsum.carried_over(z_new, x, 1.0), z_new)
    w = 0.3
    z = pushsum.debiased(x, w)
    np.testing.assert_allclose(pushsum.carried_over(z_new, x, w) - x, z_new - z, atol=1e-14)


# The command


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert cli.main(["topology", *arguments]) == status
    out, err = capsys.readouterr()
    assert (err if status == 0 else out) == ""
    return out if status == 0 else err


@pytest.mark.parametrize(("name", "m"), [case for case in CASES if case[1] in (1, 2, 5, 12)])
def test_command_shows_every_topology(capsys: pytest.CaptureFixture[str], name: str, m: int) -> None:
    out = shown(capsys, name, "-m", str(m))
    assert out.startswith(f"{name}, {m} worker")
    assert out.count("\nstep ") == len(topology(name, m))
    assert f"spectral gap over the period   {spectral_gap(topology(name, m)):.4g}\n" in out
    assert ("w              moves" in out) == moves_weights(topology(name, m))


def test_command_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "exponential", "-m", "8") == (
        "exponential, 8 workers, period 3\n"
        "step 0\n  all keep 1/2, send 1/2 to +1\n"
        "step 1\n  all keep 1/2, send 1/2 to +2\n"
        "step 2\n  all keep 1/2, send 1/2 to +4\n"
        "spectral gap over the period   1\n"
        "steps to consensus             3, exactly the mean\n"
        "messages per worker and step   1\n"
        "push-sum weight w              stays 1; with overlap between 0.5 and 0.75\n"
    )
    assert "  1, 3, ..., 11 keep 1/2, send 1/2 to -5\n" in shown(capsys, "bipartite", "-m", "12")
    out = shown(capsys, "star", "-m", "5")
    assert "  0 keep all\n  1-4 keep 1/2, send 1/2 to 0\n" in out
    assert "  0 keep 1/5, send 1/5 to each other\n  1-4 keep all\n" in out
    assert "messages per worker and step   0.8 on average, 0 to 4" in out
    out = shown(capsys, "ring", "-m", "12", "--node-size", "3")
    assert out.startswith("ring, 4 nodes of 3 workers, period 1\nstep 0\n  all keep 1/3, send 1/3 to +3, -3\n")
    assert "to consensus             7 to a thousandth" in out


def test_command_errors(capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "'ring'" in shown(capsys, "bipartite", "-m", "7", status=1)
    assert "one of 'exponential'" in shown(capsys, "cube", "-m", "8", status=1)
    assert "positive" in shown(capsys, "ring", "-m", "0", status=1)
    assert "whole number of nodes" in shown(capsys, "ring", "-m", "7", "--node-size", "2", status=1)
    for out in (tmp_path / "none" / "a.png", tmp_path / "a.unknown"):
        assert cli.main(["topology", "ring", "-m", "3", "--out", str(out)]) == 1
        assert "hvd-slowmo topology: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["topology", "ring"])

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    original = builtins.__import__

    def absent(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert cli.main(["topology", "ring", "-m", "3", "--out", str(tmp_path / "a.png")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


def test_command_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["topology", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in NAMED)


@pytest.mark.parametrize("arguments", [["exponential", "-m", "12"], ["star", "-m", "1"], ["ring", "-m", "40"]])
def test_command_draws(capsys: pytest.CaptureFixture[str], tmp_path: Any, arguments: list[str]) -> None:
    path = tmp_path / "a.png"
    assert f"drawn into {path}" in shown(capsys, *arguments, "--out", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000
