"""Draw an outer step from Horovod's timeline: blocking, and streamed in fragments beside the computation.

    benchmarks/link.sh 1gbit python benchmarks/outer_step_timeline.py --out timeline.png

It starts one job per method with `hvd-slowmo run --timeline-filename`. A perceptron with 6.3 million float32
parameters, one thread per worker, tau = 6. The exchanges are those of Horovod's file; rank 0 times the calls of
forward, backward and step(). The figure shows the fastest block of each method, which other processes have disturbed
least.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from timelines import COMPUTATION, Lane, Panel, Span, batch_of, draw, perceptron
from torch import nn

import hvd_slowmo.torch as slowmo
from hvd_slowmo import SlowMoConfig

TAU = 6
METHODS = {
    "blocking": SlowMoConfig(tau=TAU),
    "streamed (6 fragments, 1 step late)": SlowMoConfig(tau=TAU, fragments=TAU, delay=1),
}
LANES = {
    "waits for the other rank": Lane("Horovod", "#E69F00"),
    "sum": Lane("Horovod", "#D55E00"),
    **COMPUTATION,
}


def train(method: str, blocks: int, batch: int) -> None:
    """Train; rank 0 prints its activities and the time at which each step began, in seconds since the epoch."""
    slowmo.init()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = perceptron()
    inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    optimizer = slowmo.SlowMo(inner, model, METHODS[method])
    x, y = batch_of(batch)
    spans: list[Span] = []
    begins = []
    for _ in range(blocks * TAU):
        times = [time.time()]
        loss = nn.functional.cross_entropy(model(x), y)
        times.append(time.time())
        loss.backward()
        times.append(time.time())
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.time())
        begins.append(times[0])
        spans += [Span(what, *times[i : i + 2]) for i, what in enumerate(COMPUTATION)]
    optimizer.join()
    if slowmo.rank() == 0:
        Path(os.environ["TIMELINE_SPANS"]).write_text(json.dumps([spans, begins]), encoding="utf-8")


def exchanges(path: Path) -> list[Span]:
    """Return the exchanges of outer steps in a file of `--timeline-filename`, in seconds since the epoch."""
    text = path.read_text(encoding="utf-8").rstrip().rstrip(",")
    events = json.loads(text if text.endswith("]") else text + "]")  # Horovod may end before it closes the list
    heads = [event["args"] for event in events if event.get("name") == "process_name"]
    zero = next(args["start_time_since_epoch_in_micros"] for args in heads if "name" not in args)
    names = {event["pid"]: event["args"].get("name", "") for event in events if event.get("name") == "process_name"}
    spans, opened = [], {pid: [] for pid in names}
    for event in events:
        pid = event["pid"]
        if event["ph"] == "B":
            opened[pid].append(event)
        elif event["ph"] == "E":
            begun = opened[pid].pop()
            if opened[pid] or not names[pid].startswith(("allreduce.slowmo.ledger", "allreduce.slowmo.model")):
                continue  # a part of an activity, or no exchange of an outer step
            what = "waits for the other rank" if begun["name"].startswith("NEGOTIATE") else "sum"
            spans.append(Span(what, *((zero + each["ts"]) / 1e6 for each in (begun, event))))
    return spans


def record(method: str, directory: Path, args: argparse.Namespace) -> Panel:
    """Run a job, and return its fastest block, between the middles of two blocks."""
    timeline, spans = directory / "timeline.json", directory / "spans.json"
    launcher = [Path(sys.executable).with_name("hvd-slowmo"), "run", "-np", "2", "--network-interfaces", "lo"]
    script = [sys.executable, __file__, "--train", method, "--blocks", args.blocks, "--batch-size", args.batch_size]
    command = [*launcher, "--timeline-filename", timeline, *script]
    subprocess.run([str(part) for part in command], env={**os.environ, "TIMELINE_SPANS": str(spans)}, check=True)
    computed, begins = json.loads(spans.read_text(encoding="utf-8"))
    firsts = range(TAU + TAU // 2, len(begins) - TAU, TAU)  # the first block is a warm-up
    first = min(firsts, key=lambda first: begins[first + TAU] - begins[first])
    seconds = begins[first + TAU] - begins[first]
    title = f"{method}: {1e3 * seconds:.0f} ms, the fastest of {len(firsts)} blocks"
    return Panel(title, [*(Span(*each) for each in computed), *exchanges(timeline)], begins[first : first + TAU + 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=9, help="number of blocks of each method (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="per worker and step (default: %(default)s)")
    parser.add_argument("--label", default="1 Gbit/s", help="name of this network in the figure (default: %(default)s)")
    parser.add_argument("--train", choices=METHODS, help=argparse.SUPPRESS)  # a worker
    parser.add_argument(
        "--out", type=Path, default=Path("timeline.png"), help="file of the figure (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.train:
        train(args.train, args.blocks, args.batch_size)
        return
    panels = []
    for method in METHODS:
        with tempfile.TemporaryDirectory() as directory:
            panels.append(record(method, Path(directory), args))
        print(panels[-1].title)
    draw(panels, LANES, f"2 workers, {args.label}, tau = {TAU}: computation and exchanges of rank 0", args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
