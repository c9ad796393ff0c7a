"""Measure the memory that SlowMo needs in addition to the inner optimizer, on the CPU.

    python benchmarks/memory.py                         # one worker, which sends nothing
    horovodrun -np 2 python benchmarks/memory.py        # with Horovod; one measurement per run
    horovodrun -np 2 python benchmarks/memory.py --once OSGP

25.2 million float32 parameters, one measurement per fresh process. Prints the growth of resident memory from before
SlowMo's construction to after some outer steps, and its peak in between, in multiples of the parameters' 101 MB;
medians. Expected: 2 (anchor and v), plus two chunks of 16 MiB, one in flight while the other is updated: 2.33.

Gossip alone keeps 0 on a graph whose push-sum weights stay 1 (SGP on "exponential"), 1 where they change (the
numerators, on "star"), and 2 with OSGP (the sent messages too). Messages in flight come on top: two chunks for SGP, all
sent messages for OSGP. With MALLOC_MMAP_THRESHOLD_=1000000 in the environment glibc returns freed messages to the
system, so that resident memory equals memory in use.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from hvd_slowmo.gossip import SGP
from hvd_slowmo.torch import SlowMo, SlowMoConfig

CASES = {
    "SlowMo": SlowMoConfig(tau=1),
    "Lookahead": SlowMoConfig.lookahead(1),
    "Local SGD": SlowMoConfig.local_sgd(1),
}
GOSSIP = {  # one worker sends nothing, so these are measured with Horovod
    "SGP": SlowMoConfig.sgp(),
    "SGP, star": SlowMoConfig.sgp(topology="star"),
    "OSGP": SlowMoConfig.osgp(),
    "D-PSGD": SlowMoConfig.dpsgd(),
    "SlowMo over SGP": SlowMoConfig(gossip=SGP(), tau=2),
    "SlowMo over OSGP": SlowMoConfig(gossip=SGP(overlap=True), tau=2),
}


def resident(line: str) -> int:
    """Return this process's resident memory in bytes: VmRSS, or its peak since the last reset, VmHWM."""
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def train(config: SlowMoConfig, parts: int, name: str) -> tuple[float, float]:
    """Return SlowMo's memory after some outer steps, and its peak, in multiples of the parameters' bytes.

    parts: divides the number of parameters.
    """
    sizes = (2048 * 4096, 4096, 4096 * 4032, 4032, 4032 * 74, 74)
    model = nn.ParameterList([nn.Parameter(torch.rand(size // parts)) for size in sizes])
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    inner.step()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    optimizer = SlowMo(inner, model, config, name=name)
    for _ in range(4):
        optimizer.step()
    size = 4 * sum(p.numel() for p in model.parameters())
    return (resident("VmRSS") - before) / size, (resident("VmHWM") - before) / size


def measure(case: str) -> tuple[float, float]:
    torch.set_num_threads(1)
    if "HOROVOD_SIZE" in os.environ:
        import horovod.torch as hvd

        hvd.init()
        hvd.allreduce(torch.zeros(2**22), name="Horovod's fusion buffer")
    config = {**CASES, **GOSSIP}[case]
    train(config, 1000, "small")  # excludes what libraries load at first use
    return train(config, 1, "large")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes per case (default: %(default)s)")
    parser.add_argument("--once", choices=[*CASES, *GOSSIP], help="take one measurement, in this process")
    args = parser.parse_args()
    if args.once or "HOROVOD_SIZE" in os.environ:
        case = args.once or "SlowMo"
        stays, highest = measure(case)
        print(f"{case}: {stays:.3f} {highest:.3f}")
        return
    for case in CASES:
        found = []
        for _ in range(args.repeats):
            command = [sys.executable, __file__, "--once", case]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append([float(number) for number in said.split(":")[1].split()])
        stays, highest = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{case:10} {stays:.2f} x the parameters, {highest:.2f} x at the peak")


if __name__ == "__main__":
    main()
