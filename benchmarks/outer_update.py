"""Compare the outer step without a network (gather, update, scatter) with a plain copy of as many bytes.

    python benchmarks/outer_update.py [--device cuda]

One worker, 25 million float32 parameters in 200 tensors, so that nothing is sent. Gathering reads and writes each
parameter; the update reads the mean, the anchor and v, and writes the model, the anchor and v: 8 x 4 bytes a parameter.
Prints bytes per second of an outer step and of a copy that reads and writes as many bytes, and their ratio; medians of
alternating runs. Also prints the cost that SlowMo adds to an inner step where nothing is exchanged: around an optimizer
of PyTorch (SGD without a gradient) and around another one, whose values SlowMo watches, which does nothing. Beside it
stands the cost of the wrapper that PyTorch puts around every optimizer's step() for hooks and its profiler: the inner
optimizer's is in neither figure, and SlowMo has one only while there are hooks or a profiler. These are minima.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.torch import SlowMo, SlowMoConfig


def clock(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Idle(torch.optim.SGD):
    """Inner optimizer that does nothing, so that only the cost of the wrapper remains."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch overloads it
        pass


def wrapped(tensors: int, size: int, tau: int, device: str, inner: type[torch.optim.SGD] = Idle) -> SlowMo:
    model = nn.ParameterList([nn.Parameter(torch.rand(size, device=device)) for _ in range(tensors)])
    return SlowMo(inner(model.parameters(), lr=0.1), model, SlowMoConfig(tau=tau), comm=SoloComm())


def beyond(step: Callable[[], object], other: Callable[[], object], device: str) -> float:
    """Return the microseconds that one call takes more than another: between the fastest of short alternating runs."""
    steps = 20  # so short that another process of this machine leaves some runs alone

    def repeated(work: Callable[[], object]) -> float:
        return clock(lambda: [work() for _ in range(steps)], device)

    runs = [(repeated(step), repeated(other)) for _ in range(500)]
    return 1e6 * (min(mine for mine, _ in runs) - min(theirs for _, theirs in runs)) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=15, help="outer steps and copies (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tensors, size = 200, 125_000
    optimizer = wrapped(tensors, size, 1, args.device)
    source = torch.rand(4 * tensors * size, device=args.device)
    target = torch.empty_like(source)
    outer, copy = [], []
    for number in range(args.repeats + 2):  # the first two warm up
        times = clock(optimizer.step, args.device), clock(lambda: target.copy_(source), args.device)
        if number > 1:
            outer.append(times[0])
            copy.append(times[1])
    moved = 8 * 4 * tensors * size / 1e9
    ratio = statistics.median(b / a for a, b in zip(outer, copy, strict=True))
    print(
        f"{args.device}: outer step {moved / statistics.median(outer):.1f} GB/s, copy "
        f"{moved / statistics.median(copy):.1f} GB/s: {100 * ratio:.0f} % of the copy's"
    )
    for count in (1, 200):
        pytorchs, another = (wrapped(count, 1000, 10**9, args.device, inner) for inner in (torch.optim.SGD, Idle))
        idle = another.inner_optimizer
        costs = [beyond(each.step, each.inner_optimizer.step, args.device) for each in (pytorchs, another)]
        wrapper = beyond(idle.step, lambda o=idle: Idle.step.__wrapped__(o), args.device)
        print(
            f"{args.device}: an inner step with {count} parameters costs {costs[0]:.1f} µs around PyTorch's SGD, "
            f"{costs[1]:.1f} µs around another optimizer; PyTorch's step() wrapper costs {wrapper:.1f} µs"
        )


if __name__ == "__main__":
    main()
