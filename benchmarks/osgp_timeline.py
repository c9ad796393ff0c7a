"""Draw when a worker computes and when its messages are in flight, for SGP and OSGP.

    benchmarks/link.sh 1gbit horovodrun --network-interfaces lo -np 2 python benchmarks/osgp_timeline.py --out osgp.png

A perceptron with 6.3 million float32 parameters, one thread per worker. Rank 0 times the calls of forward, backward and
step(). A message begins when it is handed to Horovod and ends when a thread that polls every 2 ms finds it complete.
The figure shows the consecutive steps of each method whose times are closest to the median.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from timelines import COMPUTATION, Lane, Panel, Span, batch_of, draw, perceptron
from torch import nn

from hvd_slowmo.torch import SlowMo, SlowMoConfig
from hvd_slowmo_torch.comm.horovod import HorovodComm, Push

LOOK_S = 0.002
LANES = {"message": Lane("message", "#D55E00"), **COMPUTATION}


class WatchedComm(HorovodComm):
    """HorovodComm that records when each message begins and ends."""

    def __init__(self, spans: list[Span]) -> None:
        super().__init__(hvd.global_process_set, None)
        self._spans = spans
        self._open: dict[int, float] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def start_push(self, name: str, x: torch.Tensor, shares: Any) -> Push:
        begin = time.perf_counter()
        push = super().start_push(name, x, shares)
        with self._lock:
            self._open[push.handle] = begin
        return push

    def wait(self, handle: Any) -> torch.Tensor:
        result = super().wait(handle)
        if isinstance(handle, Push):
            self._close(handle.handle)
        return result

    def _close(self, handle: int) -> None:
        with self._lock:
            begin = self._open.pop(handle, None)
            if begin is not None:
                self._spans.append(Span("message", begin, time.perf_counter()))

    def _watch(self) -> None:
        while True:
            with self._lock:
                handles = list(self._open)
            for handle in handles:
                try:
                    over = hvd.poll(handle)
                except ValueError:  # `wait` has already taken the result
                    over = True
                if over:
                    self._close(handle)
            time.sleep(LOOK_S)


def record(config: SlowMoConfig, name: str, steps: int, batch: int) -> tuple[list[Span], list[float]]:
    """Train; return this worker's activities, and the time at which each step began."""
    torch.manual_seed(0)
    model = perceptron()
    inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    spans: list[Span] = []
    optimizer = SlowMo(inner, model, config, comm=WatchedComm(spans), name=name)
    x, y = batch_of(batch)
    begins = []
    for _ in range(steps):
        times = [time.perf_counter()]
        loss = nn.functional.cross_entropy(model(x), y)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
        begins.append(times[0])
        spans += [Span(what, *times[i : i + 2]) for i, what in enumerate(COMPUTATION)]
    optimizer.join()
    return spans, begins


def usual(name: str, spans: list[Span], begins: list[float], shown: int) -> Panel:
    """Return the consecutive steps whose times are closest to the median."""
    lengths = [after - before for before, after in itertools.pairwise(begins)]
    median = statistics.median(lengths)
    first = min(range(len(lengths) - shown + 1), key=lambda i: sum(abs(x - median) for x in lengths[i : i + shown]))
    title = f"{name}: {1e3 * median:.0f} ms per step (median of {len(lengths)})"
    return Panel(title, spans, begins[first : first + shown + 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="number of steps of each method (default: %(default)s)")
    parser.add_argument("--shown", type=int, default=3, help="number of steps in the figure (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="per worker and step (default: %(default)s)")
    parser.add_argument("--label", default="1 Gbit/s", help="name of this network in the figure (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("osgp_timeline.png"), help="file of the figure (default: %(default)s)"
    )
    args = parser.parse_args()
    hvd.init()
    torch.set_num_threads(1)
    configs = {"SGP": SlowMoConfig.sgp(), "OSGP": SlowMoConfig.osgp()}
    recorded = {name: record(config, name, args.steps, args.batch_size) for name, config in configs.items()}
    if hvd.rank() == 0:
        for name, (spans, begins) in recorded.items():
            lengths = [after - before for before, after in itertools.pairwise(begins)]
            means = (statistics.median(s.end - s.begin for s in spans if s.what == w) for w in ("forward", "backward"))
            print(
                f"{name}: median {1e3 * statistics.median(lengths):.0f} ms per step, minimum {1e3 * min(lengths):.0f}; "
                f"forward and backward {1e3 * sum(means):.0f}"
            )
        title = f"{hvd.size()} workers, {args.label}: computation and messages of rank 0"
        panels = [usual(name, *parts, args.shown) for name, parts in recorded.items()]
        draw(panels, LANES, title, args.out)
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()
