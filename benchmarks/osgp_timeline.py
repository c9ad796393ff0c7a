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
from typing import Any, NamedTuple

import horovod.torch as hvd
import torch
from torch import nn

from hvd_slowmo.torch import SlowMo, SlowMoConfig
from hvd_slowmo_torch.comm.horovod import HorovodComm, Push

LOOK_S = 0.002
LANES = {"forward": "#56B4E9", "backward": "#0072B2", "step(), waits included": "#009E73", "message": "#D55E00"}


class Span(NamedTuple):
    """An activity of a worker; times in seconds."""

    what: str
    begin: float
    end: float


class WatchedComm(HorovodComm):
    """HorovodComm that records when each message begins and ends."""

    def __init__(self, spans: list[Span]) -> None:
        super().__init__(hvd.global_process_set)
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
    model = nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 2016), nn.ReLU(), nn.Linear(2016, 74))
    inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    spans: list[Span] = []
    optimizer = SlowMo(inner, model, config, comm=WatchedComm(spans), name=name)
    x, y = torch.randn(batch, 1024), torch.randint(74, (batch,))
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
        spans += [Span(what, *times[i : i + 2]) for i, what in enumerate(list(LANES)[:3])]
    optimizer.join()
    return spans, begins


def draw(recorded: dict[str, tuple[list[Span], list[float]]], shown: int, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(len(recorded), 1, figsize=(10, 4.4), sharex=True, layout="constrained")
    for axis, (name, (spans, begins)) in zip(axes, recorded.items(), strict=True):
        lengths = [after - before for before, after in itertools.pairwise(begins)]
        usual = statistics.median(lengths)
        first = min(range(len(lengths) - shown + 1), key=lambda i: sum(abs(x - usual) for x in lengths[i : i + shown]))
        begins = begins[first : first + shown + 1]
        zero, last = begins[0], begins[-1]
        for span in spans:
            if span.end > zero and span.begin < last:
                begin, end = max(span.begin, zero), min(span.end, last)
                lane = 0 if span.what == "message" else 1
                axis.broken_barh(
                    [(begin - zero, end - begin)], (lane + 0.1, 0.8), color=LANES[span.what], edgecolor="white"
                )
        for begin in begins:
            axis.axvline(begin - zero, color="black", linewidth=0.8, linestyle=":")
        axis.set(
            title=f"{name}: {1e3 * usual:.0f} ms per step (median of {len(lengths)})", yticks=[0.5, 1.5], ylim=(0, 2)
        )
        axis.set_yticklabels(["message", "computation"])
    axes[-1].set_xlabel("seconds; dotted: a step begins")
    figure.legend(
        handles=[Patch(color=colour, label=what) for what, colour in LANES.items()], loc="outside right upper"
    )
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
        draw(recorded, args.shown, title, args.out)
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()
