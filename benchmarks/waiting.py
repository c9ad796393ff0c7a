"""Compare ways to wait for a collective: poll without a pause, as `hvd.synchronize` does, or with one.

    horovodrun -np 4 python benchmarks/waiting.py

Prints the median time of an allreduce for each pause (0: `hvd.synchronize`); the ways take turns within one run. The
library's pause is _PAUSE_S in torch/hvd_slowmo_torch/comm/horovod.py.
"""

from __future__ import annotations

import argparse
import statistics
import time

import horovod.torch as hvd
import torch


def once(x: torch.Tensor, pause: float) -> float:
    started = time.perf_counter()
    handle = hvd.allreduce_async_(x, op=hvd.Sum, name=f"waiting.{x.numel()}")
    if pause:
        while not hvd.poll(handle):
            time.sleep(pause)
    hvd.synchronize(handle)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each way (default: %(default)s)")
    repeats = parser.parse_args().repeats
    hvd.init()
    torch.set_num_threads(1)
    pauses = (0.0, 0.00005, 0.0002, 0.001)
    for megabytes in (0.0001, 1, 16, 100):
        x = torch.zeros(int(megabytes * 250_000))
        times: dict[float, list[float]] = {pause: [] for pause in pauses}
        for _ in range(repeats):
            for pause in pauses:
                hvd.barrier()
                times[pause].append(once(x, pause))
        if hvd.rank() == 0:
            line = "  ".join(f"{1e6 * p:5.0f} µs: {1e3 * statistics.median(t):7.2f} ms" for p, t in times.items())
            print(f"{hvd.size()} workers, {megabytes:8g} MB   pause {line}")


if __name__ == "__main__":
    main()
