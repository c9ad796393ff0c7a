"""Measure simulations: steps per second and memory, and their speed against threads.

    python benchmarks/simulation.py

A network of 9,985 parameters (64, 133 and 10 units) with batches of 32 and SGD with momentum. First 1,024 workers in
one process, for several methods: steps per second in blocks of 12 steps with one outer step (the median block, and the
fastest, since another process of the machine may slow some), the processor's seconds per step, and the peak of the
process's memory above that of the imported libraries; each in a process of its own. Then the same training by few
workers, simulated and as threads (`ThreadWorld`) with `SlowMo`, and the ratios. On a machine that is busy otherwise,
the processor's seconds are the ones to compare, with --threads 1: several threads wait for each other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import Simulation, SlowMo, SlowMoConfig

TAU, BATCH = 12, 32
METHODS = {
    "SlowMo": SlowMoConfig(tau=TAU),
    "SlowMo over SGP": SlowMoConfig.sgp(tau=TAU),
    "SlowMo over OSGP": SlowMoConfig.osgp(tau=TAU),
    "SlowMo, 8 bits": SlowMoConfig(tau=TAU, bits=8),
    "SlowMo, streamed": SlowMoConfig(tau=TAU, fragments=4, delay=1),
    "AR-SGD": SlowMoConfig.ar_sgd(),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 133), nn.ReLU(), nn.Linear(133, 10))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def data(*leading: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(*leading, BATCH, 64, generator=generator),
        torch.randint(10, (*leading, BATCH), generator=generator),
    )


def simulated(workers: int, config: SlowMoConfig) -> Callable[[], object]:
    simulation = Simulation(network, sgd, nn.functional.cross_entropy, workers, config)
    x, y = data(workers)
    return lambda: [simulation.step(x, y) for _ in range(TAU)]


def threaded(workers: int, config: SlowMoConfig, blocks: int) -> list[float]:
    """Return the seconds of each block on threads, by the first worker's clock."""

    def work(comm: Any) -> list[float]:
        model, (x, y), times = network(), data(), []
        optimizer = SlowMo(sgd(model.parameters()), model, config, comm=comm)
        for _ in range(blocks):
            started = time.perf_counter()
            for _ in range(TAU):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            times.append(time.perf_counter() - started)
        return times

    first, *_ = ThreadWorld(workers).run(work)
    assert isinstance(first, list)
    return first


def clocked(block: Callable[[], object], blocks: int) -> list[float]:
    """Return the seconds of each block, without a first one."""
    block()
    times = []
    for _ in range(blocks):
        started = time.perf_counter()
        block()
        times.append(time.perf_counter() - started)
    return times


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(name: str, workers: int, blocks: int, threads: int) -> str:
    torch.set_num_threads(threads)
    simulated(2, METHODS[name])()  # imports what it needs
    before = peak_mb()
    block = simulated(workers, METHODS[name])
    begun = time.process_time()
    times = clocked(block, blocks)
    processor = (time.process_time() - begun) / (TAU * (blocks + 1))
    speed, fastest = TAU / statistics.median(times), TAU / min(times)
    return (
        f"{name:<18}{workers:>6} workers  {speed:6.1f} steps per second (fastest block {fastest:.1f}), "
        f"{processor:.3f} processor seconds per step, {peak_mb() - before:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--few", type=int, nargs="*", default=[8, 32], help="workers as threads too (default: 8 32)")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of 12 steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's, of a simulation (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in args.methods:
            print(pool.apply(measure, (name, args.workers, args.blocks, args.threads)), flush=True)
    for workers in args.few:
        torch.set_num_threads(1)  # the workers are threads themselves
        begun = time.process_time()
        times = threaded(workers, METHODS["SlowMo"], args.blocks + 1)
        processor = time.process_time() - begun
        torch.set_num_threads(args.threads)
        block = simulated(workers, METHODS["SlowMo"])
        begun = time.process_time()
        alone = clocked(block, args.blocks)
        ratio = processor / (time.process_time() - begun)
        speed, threads = TAU / min(alone), TAU / min(times[1:])
        print(
            f"SlowMo, {workers} workers: {speed:.0f} steps per second simulated, {threads:.1f} on threads: "
            f"{speed / threads:.1f} times as many, and {ratio:.1f} times as many per processor second",
            flush=True,
        )


if __name__ == "__main__":
    main()
