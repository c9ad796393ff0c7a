"""Compare work on a long tensor in a TensorFlow trace: all at once, in tiles, and compiled by XLA.

    OMP_NUM_THREADS=1 python benchmarks/tiles_keras.py

Prints milliseconds for a chunk of 16 MiB, medians of several rounds in turn, and the ratio to all at once. The outer
update has slow momentum; the codes are those of 8 and 4 bits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf

from hvd_slowmo.core.parts.codec import plain
from hvd_slowmo.core.parts.layout import BLOCK
from hvd_slowmo.core.parts.outer_update import Momentum, outer_update
from hvd_slowmo.tf import SlowMoConfig
from hvd_slowmo_tf.traces.codec import KerasCodec
from hvd_slowmo_tf.traces.tiles import tiled_outer_update

Work = Callable[..., Any]


def update(function: Work) -> Work:
    config = SlowMoConfig(tau=12, beta=0.5)
    return lambda mean, anchor, v, m: function(config, mean, anchor, v, Momentum(*m))


def encode(codec: KerasCodec, bits: int) -> Work:
    return lambda mean, anchor, v, m: codec.encode(plain(mean), 0, mean.shape[0] // BLOCK, bits)


def milliseconds(call: Work) -> float:
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--elements", type=int, default=4 * 2**20)
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    vectors = [tf.random.normal([args.elements], seed=seed) for seed in range(3)]
    coefficients = [tf.constant(each) for each in (0.5, 0.5, 1.0)]
    at_once, tiled = KerasCodec(tiled=False), KerasCodec()
    rows: dict[str, tuple[Work, Work]] = {
        "outer update": (update(outer_update), update(tiled_outer_update)),
        "8 bits": (encode(at_once, 8), encode(tiled, 8)),
        "4 bits": (encode(at_once, 4), encode(tiled, 4)),
    }
    for name, (whole, in_tiles) in rows.items():
        traces = [tf.function(whole), tf.function(in_tiles), tf.function(whole, jit_compile=True)]
        calls = [partial(trace, *vectors, coefficients) for trace in traces]
        times = [[milliseconds(call) for call in calls] for _ in range(args.rounds + 2)][2:]  # the first trace
        first, *others = (statistics.median(each) for each in zip(*times, strict=True))
        told = ", ".join(
            f"{words} {found:.1f} ({found / first:.2f} x)"
            for words, found in zip(("in tiles", "XLA"), others, strict=True)
        )
        print(f"{name}: {first:.1f} ms at once, {told}")


if __name__ == "__main__":
    main()
