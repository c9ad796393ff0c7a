"""Options, methods and measurement of step_time.py and step_time_keras.py; the methods take turns."""

from __future__ import annotations

import json
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from pathlib import Path

from hvd_slowmo import SlowMoConfig
from hvd_slowmo.gossip import DPSGD, SGP

TAU = 12
ALONE = "no communication"  # the reference of all ratios
MESSAGE = "the message alone"  # the message of a gossip step on the topology "exponential", without computation
USUAL = ("ours: Local SGD", "ours: SlowMo", "ours: SlowMo, streamed", "ours: AR-SGD", "ours: SGP", "ours: OSGP")
_DRAIN_S = 0.5  # after a turn: a fragment in flight arrives before another method is measured
Step = Callable[[], None]


def ours(tau_gossip: int) -> dict[str, tuple[SlowMoConfig, str]]:
    """Return our methods: settings, and the prefix of their collectives' names."""
    return {
        "ours: Local SGD": (SlowMoConfig.local_sgd(TAU), "local"),
        "ours: SlowMo": (SlowMoConfig(tau=TAU), "slowmo"),
        "ours: SlowMo, one step late": (SlowMoConfig(tau=TAU, delay=1), "late"),
        "ours: SlowMo, in fragments": (SlowMoConfig(tau=TAU, fragments=TAU), "fragments"),
        "ours: SlowMo, streamed": (SlowMoConfig(tau=TAU, fragments=TAU, delay=1), "streamed"),
        "ours: SlowMo, streamed, 8 bits": (SlowMoConfig(tau=TAU, fragments=TAU, delay=2, bits=8), "eight"),
        "ours: SlowMo, streamed, 8 bits, 1 late": (SlowMoConfig(tau=TAU, fragments=TAU, delay=1, bits=8), "eight.one"),
        "ours: SlowMo, streamed, 4 bits": (SlowMoConfig(tau=TAU, fragments=TAU, delay=2, bits=4), "four"),
        "ours: SlowMo, 48 steps, 4 bits": (SlowMoConfig(tau=4 * TAU, fragments=4 * TAU, delay=2, bits=4), "long.four"),
        "ours: SlowMo, 8 bits, 1 late": (SlowMoConfig(tau=TAU, delay=1, bits=8), "late.eight"),
        "ours: SlowMo, 8 bits, 2 late": (SlowMoConfig(tau=TAU, delay=2, bits=8), "later.eight"),
        "ours: SlowMo, 8 bits": (SlowMoConfig(tau=TAU, bits=8), "blocking.eight"),
        "ours: AR-SGD": (SlowMoConfig.ar_sgd(), "all"),
        "ours: SGP": (SlowMoConfig.sgp(), "sgp"),
        "ours: OSGP": (SlowMoConfig.osgp(), "osgp"),
        "ours: D-PSGD": (SlowMoConfig.dpsgd(), "dpsgd"),
        "ours: SlowMo over AR-SGD": (SlowMoConfig(tau=TAU, gradients="all"), "slowmo.all"),
        "ours: SlowMo over D-PSGD": (SlowMoConfig(gossip=DPSGD(), tau=tau_gossip), "slowmo.dpsgd"),
        "ours: SlowMo over SGP": (SlowMoConfig(gossip=SGP(), tau=tau_gossip), "slowmo.sgp"),
        "ours: SlowMo over OSGP": (SlowMoConfig(gossip=SGP(overlap=True), tau=tau_gossip), "slowmo.osgp"),
        "ours: SlowMo over SGP, noaverage": (SlowMoConfig(gossip=SGP(), tau=tau_gossip, average=False), "slowmo.alone"),
    }


def block_of(name: str, tau_gossip: int) -> int:
    """Return a method's period in steps: a block, or 1 without blocks."""
    config, _ = ours(tau_gossip).get(name, (None, ""))
    if config is not None:
        return config.tau or 1
    return TAU if name == "PyTorch PostLocalSGD" or name.startswith("torchft ") else 1


def options(description: str | None, methods: Iterable[str]) -> ArgumentParser:
    """Return a parser with the common options.

    methods: the methods of other libraries.
    """
    usual = [*methods, *USUAL]
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=TAU, help="steps per method and round (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=usual, choices=[*methods, *ours(1), MESSAGE], metavar="METHOD")
    parser.add_argument("--pause", type=float, help="milliseconds to wait instead of forward and backward")
    parser.add_argument("--shrink", type=int, default=1, help="divisor of the layers' widths (default: %(default)s)")
    parser.add_argument("--tau-gossip", type=int, default=48, help="tau of SlowMo with gossip (default: %(default)s)")
    parser.add_argument("--label", default="loopback", help="name of this network in the output (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="append the results to this file, one line of JSON per method")
    return parser


def measure(
    steps: dict[str, Step], rounds: int, count: int, barrier: Step, tells: bool, blocks: dict[str, int]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in steps.items():
        # From here on a method's turn begins and ends in the middle of its block, so that an exchange that is late
        # begins and ends within the turn.
        for _ in range(blocks[name] // 2):
            step()
    for number in range(rounds + 1):  # the first round warms up
        for name, step in steps.items():
            if blocks[name] == 1:  # OSGP's last message has arrived since its last turn: send one to wait for
                step()
            barrier()
            started = time.perf_counter()
            whole = -(-count // blocks[name]) * blocks[name]
            for _ in range(whole):
                step()
            barrier()
            ended = time.perf_counter()
            time.sleep(_DRAIN_S)
            if number:
                times[name].append((ended - started) / whole)
            if tells and sys.stderr.isatty():
                print(f"\rround {number} of {rounds}: {name:32}", end="", file=sys.stderr)
    return times


def run(args: Namespace, make: Callable[[str], Step], barrier: Step, rank: int, size: int) -> None:
    """Measure `args.methods`, and print the results on rank 0."""
    names = [ALONE, *(name for name in args.methods if name != ALONE)]
    steps = {name: make(name) for name in names}
    blocks = {name: block_of(name, args.tau_gossip) for name in steps}
    times = measure(steps, args.rounds, args.steps, barrier, rank == 0, blocks)
    if rank == 0:
        rounds = f"median of {args.rounds} rounds of {args.steps} steps or whole blocks"
        print(f"\n{args.label}, {size} workers; {rounds}")
        for name, seconds in times.items():
            _tell(name, seconds, times[ALONE], size, args)
        _compare(times)


def _tell(name: str, seconds: list[float], alone: list[float], workers: int, args: Namespace) -> None:
    ratio = statistics.median(a / b for a, b in zip(seconds, alone, strict=True))
    median = statistics.median(seconds)
    print(f"  {name:36} {1e3 * median:8.1f} ms per step, min {1e3 * min(seconds):8.1f}   {ratio:6.2f} x", flush=True)
    if args.out:
        with args.out.open("a") as file:
            row = {"network": args.label, "workers": workers, "method": name, "s": median, "ratio": ratio}
            file.write(json.dumps(row) + "\n")


def _compare(times: dict[str, list[float]]) -> None:
    """Print the gossip methods' ratios to their lower bounds and references, as medians over the rounds."""

    def ratio(name: str, others: Iterable[float]) -> str:
        found = [seconds / other for seconds, other in zip(times[name], others, strict=True)]
        return f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"

    if MESSAGE in times:
        both = list(zip(times[ALONE], times[MESSAGE], strict=True))
        for name in ("ours: SGP", "ours: OSGP"):
            if name in times:
                print(f"  {name} / (computation + message):    {ratio(name, map(sum, both))}")
                print(f"  {name} / max(computation, message):  {ratio(name, map(max, both))}")
    for method in ("SGP", "OSGP", "D-PSGD", "AR-SGD"):
        mine, below = f"ours: SlowMo over {method}", f"ours: {method}"
        if mine in times and below in times:
            print(f"  {mine} / {below}:    {ratio(mine, times[below])}", flush=True)
