"""Codes of few bits: the same bytes and values in every framework, and their errors."""

from functools import partial

import numpy as np
import pytest
import tensorflow as tf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_slowmo.core.parts.codec import LEVELS, Elementwise, NumpyCodec, blocks_in, payload_bytes, plain
from hvd_slowmo.core.parts.layout import BLOCK
from hvd_slowmo.core.parts.slices import Slices
from hvd_slowmo_tf.traces.codec import KerasCodec
from hvd_slowmo_torch.simulator.stack import StackCodec
from hvd_slowmo_torch.tensors.codec import TorchCodec
from reference.few_bits import rounded

BITS = [16, 8, 4]


def vector(blocks, seed):
    """Return values of many sizes, a block of zeros, and one whose values are halfway between two codes."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(blocks, BLOCK)) * np.exp(4 * rng.normal(size=(blocks, 1)))
    g[:1] = 0
    g[1:2] = np.resize([*np.arange(-126.5, 127), 127], BLOCK)
    return g.astype(np.float32).reshape(-1)


def decode(codec, message, bits, *span):
    return codec.decode(codec.cut(message, bits, *span), bits)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=20, deadline=None)
@given(blocks=st.integers(0, 300), seed=st.integers(0, 1000), tile=st.sampled_from([None, 1, 7, 64]))
def test_frameworks_have_the_same_bytes_and_values(bits, blocks, seed, tile):
    g = vector(blocks, seed)
    mine = NumpyCodec().encode(plain(g), 0, blocks, bits)
    other = TorchCodec(tile).encode(plain(torch.from_numpy(g)), 0, blocks, bits)
    assert len(mine) == payload_bytes(len(g), bits)
    assert np.array_equal(mine, other.numpy())
    decoded = decode(NumpyCodec(), mine, bits)
    assert np.array_equal(decoded.view(np.uint32), decode(TorchCodec(), other, bits).numpy().view(np.uint32))
    assert np.array_equal(decoded, rounded(g, bits))
    traced = KerasCodec().encode(plain(tf.constant(g)), 0, blocks, bits)
    assert np.array_equal(mine, traced.numpy())
    values = decode(KerasCodec(), traced, bits).numpy()
    assert np.array_equal(decoded.view(np.uint32), values.view(np.uint32))
    first, last = blocks // 3, blocks // 2
    for part in (decode(TorchCodec(), other, bits, first, last), decode(KerasCodec(), traced, bits, first, last)):
        assert np.array_equal(part.numpy(), decoded[first * BLOCK : last * BLOCK])


@pytest.mark.parametrize("bits", [32, *BITS])
@pytest.mark.parametrize("codec", [NumpyCodec(), TorchCodec(2), TorchCodec(None), StackCodec(), KerasCodec()])
def test_a_vector_is_encoded_in_pieces(codec, bits):
    """A part of the sum of a vector, which ends within a block, and of another one in its code."""
    blocks, first, missing = 7, 1, 300
    a, b = vector(blocks, 1), vector(blocks, 2)
    kind = {TorchCodec: torch.from_numpy, StackCodec: lambda x: torch.from_numpy(x)[:, None], KerasCodec: tf.constant}
    tensor = kind.get(type(codec), np.asarray)
    message = codec.encode(plain(tensor(b)), 0, blocks, bits)

    def coded(start, stop):
        return codec.cut(message, bits, start, stop)

    def scaled_sum(factor, x, code):
        other = codec.decode(code, bits)
        return x * factor + other[: len(x)]

    of = Elementwise(scaled_sum, (blocks_in(tensor(a)[:-missing]), coded), (2,))
    sent = (lambda g: g) if bits == 32 else partial(rounded, bits=bits)
    exact = np.pad((a * 2 + sent(b))[first * BLOCK : -missing], (0, missing))
    expected = NumpyCodec().encode(plain(exact), 0, blocks - first, bits)
    assert np.array_equal(codec.compute(of, first, blocks), exact[:-missing].reshape(-1, *tensor(a).shape[1:]))
    assert np.array_equal(np.asarray(codec.encode(of, first, blocks, bits)).reshape(-1), expected)
    found, rest = codec.encode_with_rest(of, first, blocks, bits)
    assert np.array_equal(np.asarray(found).reshape(-1), expected)
    assert np.array_equal(np.asarray(rest).reshape(-1), exact - sent(exact))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_value_is_off_by_half_a_level_at_most(bits):
    g = vector(50, 1)
    codec = NumpyCodec()
    error = np.abs(decode(codec, codec.encode(plain(g), 0, 50, bits), bits) - g).reshape(-1, BLOCK)
    level = np.abs(g).reshape(-1, BLOCK).max(axis=1, keepdims=True) / LEVELS[bits]
    assert (error <= level * 0.5000001).all()


@given(length=st.integers(1, 100_000), workers=st.integers(1, 9))
def test_slices_are_whole_blocks_and_cover_the_vector_once(length, workers):
    slices = Slices(length, workers)
    spans = [slices.span(rank) for rank in range(workers)]
    assert [first for first, _ in spans] == [0, *(last for _, last in spans[:-1])]
    assert spans[-1][1] * BLOCK >= length > (spans[-1][1] - 1) * BLOCK
    assert max(map(slices.elements, range(workers))) - min(map(slices.elements, range(workers))) <= BLOCK
