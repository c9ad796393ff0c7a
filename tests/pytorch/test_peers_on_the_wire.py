"""Bugs of other implementations in late, streamed and compressed outer steps, each as a test of this one.

Sources: the projects' code, and for torchft its behaviour (0.2.0).
"""

import copy

import numpy as np
import pytest
import torch

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.core.parts.codec import payload_bytes
from support import few_bits

STREAMED = {"fragments": 4, "delay": 2}


def constant(model, optimizer, steps):
    """Take steps with gradients of one; they move the parameters by an eighth each."""
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()


@pytest.mark.parametrize("settings", [{"delay": 2}, {"delay": 4}, STREAMED], ids=str)
def test_torchft_the_steps_trained_while_an_exchange_travels_are_not_thrown_away(settings):
    def work(comm):
        model, optimizer = few_bits.build(comm, bits=32, beta=0.0, **settings)
        start = model.weight.detach().clone()
        constant(model, optimizer, 15)
        return (start - model.weight.detach()).mean().item()

    assert ThreadWorld(2).run(work) == pytest.approx([15 / 8] * 2)


@pytest.mark.parametrize("bits", [32, 8])
def test_co2_what_travels_is_not_the_parameters_that_are_trained_meanwhile(bits):
    """The parameters are overwritten right after the exchange has begun; the mean is of those from before."""

    def work(comm):
        model, optimizer = few_bits.build(comm, bits=bits, delay=1, tau=4, beta=0.0)
        constant(model, optimizer, 4)
        sent = model.weight.detach().clone()
        with torch.no_grad():
            model.weight += 1000.0
        constant(model, optimizer, 1)
        return few_bits.flat(
            optimizer, "anchor"
        ) if bits < 32 else model.weight.detach().numpy() - 999.875, sent.numpy()

    for anchor, sent in ThreadWorld(2).run(work):
        np.testing.assert_allclose(anchor.reshape(-1), sent.reshape(-1), atol=1e-3)


def test_muloco_the_outer_rate_is_applied_once():
    def work(comm):
        model, optimizer = few_bits.build(comm, bits=32, alpha=0.7, beta=0.0, tau=2)
        start = model.weight.detach().clone()
        constant(model, optimizer, 2)
        return (start - model.weight.detach()).mean().item()

    assert ThreadWorld(2).run(work) == pytest.approx([0.7 * 2 / 8] * 2)


@pytest.mark.parametrize("settings", [{}, STREAMED], ids=str)
@pytest.mark.parametrize(("bits", "factor"), [(16, 2.0), (8, 3.9), (4, 7.8)])
def test_noloco_torchft_few_bits_are_few_bytes_on_the_wire(settings, bits, factor):
    """NoLoCo sends sparse differences as dense tensors; torchft falls back to full precision in silence.

    Two workers and a matrix of four blocks of 1024 values: each block is sent to its owner, and its mean back.
    """

    def work(comm, bits):
        model, optimizer = few_bits.build(comm, bits=bits, **settings)
        before = optimizer.bytes_sent
        constant(model, optimizer, 4 + settings.get("delay", 0))  # one block, and all of it has landed
        return optimizer.bytes_sent - before

    few, whole = (sum(ThreadWorld(2).run(lambda comm, b=b: work(comm, b))) for b in (bits, 32))
    others = whole - 2 * 4 * int(np.prod(few_bits.SHAPE))  # ledgers and the bias
    assert few - others == 2 * 4 * payload_bytes(1024, bits)
    ring = 2 * 4 * 4096  # two workers, each sends as many bytes as the float32 values have
    assert ring / (few - others) >= factor


@pytest.mark.parametrize("settings", [{"bits": 32, **STREAMED}, {"bits": 8, **STREAMED}, {"bits": 4}], ids=str)
def test_torchft_workers_end_with_equal_parameters_however_messages_are_cut(settings, monkeypatch):
    """torchft leaves out a tensor that does not fit into a bucket: here a weight of many messages, and a bias."""
    monkeypatch.setattr(few_bits.SlowMo, "_chunk_bytes", 5000)

    def work(comm):
        model, optimizer = few_bits.build(comm, **settings)
        for k in range(13):
            few_bits.step(model, optimizer, comm.rank, k)
        optimizer.join()
        return copy.deepcopy(model.state_dict())

    first, *others = ThreadWorld(3).run(work)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
