"""Push-sum weights, in NumPy, PyTorch and TensorFlow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_slowmo.topology import push_sum as pushsum
from hvd_slowmo.topology.checks import topology
from support.graphs import CASES
from support.sample import examples


@pytest.mark.slow
@examples(100)
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
    assert np.array_equal(z_new + pushsum.carried_share(1.0) * x, z_new)
    w = 0.3
    z = x / w
    np.testing.assert_allclose(z_new + pushsum.carried_share(w) * x - x, z_new - z, atol=1e-14)
