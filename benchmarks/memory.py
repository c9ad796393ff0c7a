"""The memory that SlowMo takes beside the base optimizer, on the CPU.

    python benchmarks/memory.py                         # one worker, which sends nothing
    horovodrun -np 2 python benchmarks/memory.py        # with Horovod; one measurement per start
    horovodrun -np 2 python benchmarks/memory.py --once OSGP

25.2 million float32 parameters, fresh processes, one measurement in each. Printed is by how much resident memory has
grown from before SlowMo is constructed to after some outer steps, and at its highest in between, in multiples of the
parameters' own 101 MB; medians. To expect: 2 (anchor and v), and two chunks of 16 MiB, one that travels while the other
is updated: 2.33. Gossip alone keeps nothing over a graph on which push-sum weights stay 1 (SGP over "exponential"), the
numerators where they move (over "star"), and over OSGP also what was sent: 0, 1 and 2; and what travels beside that:
two chunks for SGP, all that was sent for OSGP. With MALLOC_MMAP_THRESHOLD_=1000000 in the environment glibc gives freed
messages back, and what is resident is what is in use.
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
GOSSIP = {  # nothing is sent by one worker: these are measured with Horovod
    "SGP": SlowMoConfig.sgp(),
    "SGP, star": SlowMoConfig.sgp(topology="star"),
    "OSGP": SlowMoConfig.osgp(),
    "D-PSGD": SlowMoConfig.dpsgd(),
    "SlowMo over SGP": SlowMoConfig(gossip=SGP(), tau=2),
    "SlowMo over OSGP": SlowMoConfig(gossip=SGP(overlap=True), tau=2),
}


def resident(line: str) -> int:
    """Bytes of resident memory of this process: VmRSS, or VmHWM, the highest since it was reset."""
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def train(config: SlowMoConfig, parts: int, name: str) -> tuple[float, float]:
    """What SlowMo has taken after some outer steps, and at the highest, in multiples of the parameters' bytes.

    parts: train a network of so many times fewer parameters.
    """
    sizes = (2048 * 4096, 4096, 4096 * 4032, 4032, 4032 * 74, 74)
    model = nn.ParameterList([nn.Parameter(torch.rand(size // parts)) for size in sizes])
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    base.step()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest counts from here
    optimizer = SlowMo(base, model, config, name=name)
    for _ in range(4):
        optimizer.step()
    size = 4 * sum(p.numel() for p in model.parameters())
    return (resident("VmRSS") - before) / size, (resident("VmHWM") - before) / size


def measure(case: str) -> tuple[float, float]:
    torch.set_num_threads(1)
    if "HOROVOD_SIZE" in os.environ:
        import horovod.torch as hvd

        hvd.init()
        hvd.allreduce(torch.zeros(2**22), name="buffers of Horovod's own")
    config = {**CASES, **GOSSIP}[case]
    train(config, 1000, "small")  # what the libraries load at their first use is no matter here
    return train(config, 1, "large")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes per case (default: %(default)s)")
    parser.add_argument("--once", choices=[*CASES, *GOSSIP], help="one measurement, in this process")
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
        print(f"{case:10} {stays:.2f} x the parameters stay, {highest:.2f} x at the highest")


if __name__ == "__main__":
    main()
