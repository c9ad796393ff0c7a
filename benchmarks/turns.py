"""Methods that take turns at training: what step_time.py and step_time_keras.py share."""

from __future__ import annotations

import json
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

TAU = 12
ALONE = "no communication"  # the method that the others are compared with
Step = Callable[[], None]


def options(description: str | None, methods: Iterable[str], further: Iterable[str] = ()) -> ArgumentParser:
    """further: methods that are measured only where they are asked for."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=TAU, help="steps per method and round (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=list(methods), choices=[*methods, *further], metavar="METHOD")
    parser.add_argument("--label", default="loopback", help="what to call this network (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append the figures to this file, a line of JSON each")
    return parser


def measure(
    steps: dict[str, Step], rounds: int, count: int, barrier: Step, tells: bool, block_of: Callable[[str], int]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):  # the first round warms up
        for name, step in steps.items():
            barrier()
            started = time.perf_counter()
            whole = -(-count // block_of(name)) * block_of(name)
            for _ in range(whole):
                step()
            barrier()
            if number:
                times[name].append((time.perf_counter() - started) / whole)
            if tells and sys.stderr.isatty():
                print(f"\rround {number} of {rounds}: {name:32}", end="", file=sys.stderr)
    return times


def run(
    hvd: Any,
    args: Namespace,
    make: Callable[[str], Step],
    barrier: Step,
    block_of: Callable[[str], int] = lambda name: 1,
) -> dict[str, list[float]]:
    """Measure `args.methods`, tell on rank 0, and return the seconds per step of each round.

    hvd: horovod.torch or horovod.tensorflow. block_of: in how many steps a method does all that it does.
    """
    names = [ALONE, *(name for name in args.methods if name != ALONE)]
    steps = {name: make(name) for name in names}
    times = measure(steps, args.rounds, args.steps, barrier, hvd.rank() == 0, block_of)
    if hvd.rank() == 0:
        rounds = f"median of {args.rounds} rounds of {args.steps} steps or whole blocks"
        print(f"\n{args.label}, {hvd.size()} workers; {rounds}")
        for name, seconds in times.items():
            _tell(name, seconds, times[ALONE], hvd.size(), args)
    return times


def _tell(name: str, seconds: list[float], alone: list[float], workers: int, args: Namespace) -> None:
    ratio = statistics.median(a / b for a, b in zip(seconds, alone, strict=True))
    median = statistics.median(seconds)
    print(f"  {name:36} {1e3 * median:8.1f} ms per step, least {1e3 * min(seconds):8.1f}   {ratio:6.2f} x", flush=True)
    if args.out:
        with args.out.open("a") as file:
            row = {"network": args.label, "workers": workers, "method": name, "s": median, "ratio": ratio}
            file.write(json.dumps(row) + "\n")
