"""The elastic job of the soak: its launcher, its hosts, and what its processes hold."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from soak.diary import STOP
from support.installation import ROOT

REST_S = 25.0
"""Time after which the launcher takes a blocked host again, and more."""


class Job:
    """The job.

    Args:
        folder: empty.
        framework: "torch" or "keras".
        hosts: of the workers at the start.
        timeout: seconds that an exchange may take.
    """

    def __init__(self, folder: Path, framework: str, hosts: Sequence[str], timeout: float) -> None:
        self.folder = folder
        self.hosts: list[str] = []
        self.samples: list[dict[str, float]] = []
        self.status: int | None = None  # of the launcher, once it has ended by itself
        self._shared = _in_shared_memory()
        self._left: dict[str, float] = {}
        self.set_hosts(hosts)
        discover = folder / "discover.sh"
        discover.write_text(f"#!/bin/sh\ncat {folder}/hosts\n", encoding="utf-8")
        discover.chmod(0o700)
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "torch", ROOT / "tf", ROOT / "tests")))
        options = ["--network-interfaces", "lo", "-np", str(len(hosts)), "--min-np", "1", "--max-np", "4"]
        options += ["--blacklist-cooldown-range", "5", "20", "--host-discovery-script", str(discover)]
        self._log = (folder / "log").open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "hvd_slowmo.cli.main", "run", *options),
                *(sys.executable, "-m", f"soak.train_{framework}", str(folder)),
            ],
            env={
                **os.environ,
                "PYTHONPATH": paths,
                "OMP_NUM_THREADS": "1",
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "HVD_SLOWMO_TIMEOUT": str(timeout),
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )

    def set_hosts(self, hosts: Sequence[str]) -> None:
        """Announce these hosts."""
        for host in self.hosts:
            if host not in hosts:
                self._left[host] = time.monotonic()
        self.hosts = list(hosts)
        incoming = self.folder / "hosts.new"
        incoming.write_text("".join(f"{host}:1\n" for host in hosts), encoding="utf-8")
        incoming.replace(self.folder / "hosts")

    def wrote_since(self, moment: float) -> bool:
        """Return whether a worker has written its diary since that time: the job goes on."""
        return any(each.stat().st_mtime > moment for each in self.folder.glob("*.jsonl"))

    def rested(self, host: str) -> bool:
        """Return whether a host that has left can be announced again."""
        return time.monotonic() - self._left.get(host, -REST_S) >= REST_S

    def order(self, what: str, host: str) -> None:
        """Give a worker an order; see `soak.diary.Diary.ordered`."""
        (self.folder / f"{what}.{host}").touch()

    def training(self) -> dict[str, int]:
        """Return the processes that have come to the others and live, by their hosts."""
        found = {}
        for host in self.hosts:
            file = self.folder / f"process.{host}"
            number = file.read_text(encoding="utf-8") if file.exists() else ""
            if number and psutil.pid_exists(int(number)):
                found[host] = int(number)
        return found

    def sample(self) -> None:
        """Note what each worker holds."""
        workers = self.training().values()
        for number in workers:
            try:
                process = psutil.Process(number)
                with process.oneshot():
                    memory, files, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
            except psutil.Error:
                continue
            self.samples.append(
                {
                    "time": time.time(),
                    "process": number,
                    "workers": len(workers),
                    "memory": memory,
                    "files": files,
                    "threads": threads,
                }
            )

    def left_in_shared_memory(self) -> list[str]:
        """Return the files in /dev/shm that were not there before."""
        return sorted(_in_shared_memory() - self._shared)

    def end(self, seconds: float) -> None:
        """Ask the job to end; kill it, without a status, if it hangs."""
        (self.folder / STOP).touch()
        try:
            self.status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill()

    def kill(self) -> None:
        """End all processes of the job."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait()
        self._log.close()


def _in_shared_memory() -> set[str]:
    return {each.name for each in Path("/dev/shm").iterdir()}
