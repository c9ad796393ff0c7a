"""Measure how long an elastic job stands still when one of its three workers is killed, with the installed Horovod.

    python benchmarks/recovery.py --rounds 3

The hosts of the job are three names of this machine. Rank 2 kills itself in the middle of a loop of small
allreduces. Prints, for each round, the seconds from the kill to the next complete allreduce of each of the two others.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOSTS = ("localhost", "127.0.0.1", "127.1")
KILLED_AT, LAST = 200, 300


def worker() -> None:
    import horovod.torch as hvd
    import torch
    from horovod.common.elastic import ObjectState

    hvd.init()
    state = ObjectState(hvd.broadcast_object, hvd.rank, step=0, size=0)

    @hvd.elastic.run
    def train(state: object) -> None:
        while state.step < LAST:
            hvd.allreduce(torch.ones(1000), name="step")
            state.step += 1
            if state.size != hvd.size():
                state.size = hvd.size()
                print(f"at {time.time()} size {state.size}", flush=True)
            if state.step == KILLED_AT and hvd.rank() == 2:
                print(f"at {time.time()} killed", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            state.commit()

    train(state)


def measure(folder: Path) -> list[float]:
    """Run one job; return the seconds of the survivors."""
    discover = folder / "discover.sh"
    discover.write_text("#!/bin/sh\n" + "".join(f"echo {host}:1\n" for host in HOSTS))
    discover.chmod(0o755)
    options = ["--network-interfaces", "lo", "--min-np", "2", "--host-discovery-script", str(discover)]
    command = [sys.executable, "-m", "hvd_slowmo.cli.main", "run", "-np", "3", *options]
    job = subprocess.run([*command, "python", __file__, "--worker"], stdout=subprocess.PIPE, text=True, check=True)
    (killed,) = map(float, re.findall(r"at ([\d.]+) killed", job.stdout))
    return sorted(float(moment) - killed for moment in re.findall(r"at ([\d.]+) size 2", job.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds from the loss of a worker to the next step of the others.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(Path(folder))
        print(f"round {number + 1}:", *(f"{each:.2f} s" for each in seconds), flush=True)


if __name__ == "__main__":
    main()
