"""Run examples/elastic_torch.py or elastic_keras.py here: kill one of three workers, add another, and draw the loss.

Run it with: python examples/elastic_demo.py
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt

# Names of this machine, each a host to Horovod: it blocks the host of a killed worker.
FIRST, ADDED = ("localhost", "127.0.0.1", "127.1"), "127.0.1"
KILLED = FIRST[-1]


def entries(folder: Path, host: str) -> list[dict]:
    path = folder / f"{host}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(folder: Path, host: str) -> int:
    """Return how far a worker has come."""
    return max((entry["step"] for entry in entries(folder, host)), default=0)


def announce(folder: Path, hosts: tuple[str, ...]) -> None:
    (folder / "hosts").write_text("".join(f"{host}:1\n" for host in hosts))


def events(folder: Path, epochs: int) -> Iterator[str]:
    """Kill a worker and add one when the others have come far enough; yield a line about each."""
    kill_at, add_at = 8 * epochs, 12 * epochs  # of about 30 steps in an epoch
    while steps(folder, KILLED) < kill_at:
        yield ""
    process = next(entry["process"] for entry in reversed(entries(folder, KILLED)) if "process" in entry)
    os.kill(process, signal.SIGKILL)
    yield f"worker on {KILLED} killed at step {steps(folder, KILLED)}"
    while steps(folder, FIRST[0]) < add_at:
        yield ""
    announce(folder, (*FIRST, ADDED))
    yield f"worker on {ADDED} announced at step {steps(folder, FIRST[0])}"


def figure(folder: Path, out: Path) -> None:
    """Draw loss and number of workers over the time."""
    began = min(entry["time"] for host in (*FIRST, ADDED) for entry in entries(folder, host))
    _, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), height_ratios=(3, 1))
    for host in (*FIRST, ADDED):
        losses = [(entry["time"] - began, entry["loss"]) for entry in entries(folder, host) if "loss" in entry]
        if losses:
            above.plot(*zip(*losses, strict=True), ".", markersize=2, label=host)
    changes = [entry for entry in entries(folder, FIRST[0]) if "workers" in entry]
    for change in changes[1:]:
        at = change["time"] - began
        above.axvspan(at - change["seconds"], at, color="0.85")
        above.annotate(f"{change['seconds']:.1f} s", (at, 1), fontsize=8)
    ends = [change["time"] - began for change in changes[1:]]
    last = max(entry["time"] for entry in entries(folder, FIRST[0])) - began
    below.step([0, *ends, last], [*(change["workers"] for change in changes), changes[-1]["workers"]], where="post")
    above.set(yscale="log", ylabel="training loss", title="grey: the workers come together")
    above.legend()
    below.set(ylabel="workers", xlabel="seconds", ylim=(0, 4))
    out.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(out, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40, help="passes over the data (default: %(default)s)")
    parser.add_argument("--framework", choices=("torch", "tf"), default="torch", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="directory of the figure")
    args = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        announce(folder, FIRST)
        discover = folder / "discover.sh"
        discover.write_text(f"#!/bin/sh\ncat {folder}/hosts\n")
        discover.chmod(0o700)
        script = Path(__file__).with_name("elastic_torch.py" if args.framework == "torch" else "elastic_keras.py")
        launch = [
            str(Path(sys.executable).with_name("horovodrun")),
            "--network-interfaces",
            "lo",
            "-np",
            "3",
            "--min-np",
            "1",
            "--max-np",
            "4",
        ]
        launch += ["--host-discovery-script", str(discover), sys.executable, str(script)]
        job = subprocess.Popen([*launch, "--epochs", str(args.epochs), "--pause", "0.02", "--record", str(folder)])
        for line in events(folder, args.epochs):
            if job.poll() is not None:
                sys.exit(f"the job ended early, with status {job.returncode}")
            if line:
                print(line, flush=True)
            time.sleep(0.2)
        status = job.wait()
        out = args.out / ("elastic.png" if args.framework == "torch" else "elastic_keras.png")
        figure(folder, out)
        print(f"figure: {out}")
    sys.exit(status)


if __name__ == "__main__":
    main()
