"""The elastic job of the soak: its launcher, its hosts, and what its processes hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from soak.diary import OUTER_STEP, STOP
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
        self.status: int | None = None
        self._shared = _shared_memory()
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
        for host in set(self.hosts) - set(hosts):
            self._left[host] = time.monotonic()
            for order in self.folder.glob(f"*.{host}"):  # that a worker to come is not to find
                order.unlink(missing_ok=True)
        self.hosts = list(hosts)
        incoming = self.folder / "hosts.new"
        incoming.write_text("".join(f"{host}:1\n" for host in hosts), encoding="utf-8")
        incoming.replace(self.folder / "hosts")

    def goes_on(self, seconds: float = 5) -> bool:
        """Return whether the workers have taken an outer step in the last seconds: no fault holds the job up."""
        last = self.folder / OUTER_STEP
        return last.exists() and time.time() - last.stat().st_mtime < seconds

    def keep_diaries(self, folder: Path) -> None:
        """Copy what the workers have noted to this folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for each in self.folder.glob("*.jsonl"):
            shutil.copy(each, folder)

    def rested(self, host: str) -> bool:
        """Return whether a host that has left can be announced again."""
        return time.monotonic() - self._left.get(host, -REST_S) >= REST_S

    def order(self, what: str, host: str) -> None:
        """Give a worker an order; see `soak.diary.Diary.ordered`."""
        (self.folder / f"{what}.{host}").touch()

    def joins(self, host: str, seconds: float = 10) -> bool:
        """Let a worker join before the others, and return whether it has come so far in this time."""
        self.order("short", host)
        sign, end = self.folder / f"joining.{host}", time.monotonic() + seconds
        while not sign.exists() and time.monotonic() < end:
            time.sleep(0.01)
        (self.folder / f"short.{host}").unlink(missing_ok=True)
        if not sign.exists():
            return False
        sign.unlink()
        return True

    def training(self) -> dict[str, int]:
        """Return the processes that have come to the others and live, by their hosts."""
        found = {}
        for host in self.hosts:
            file = self.folder / f"process.{host}"
            number = file.read_text(encoding="utf-8") if file.exists() else ""
            if number and psutil.pid_exists(int(number)):
                found[host] = int(number)
        return found

    def left_in_shared_memory(self) -> list[str]:
        """Return the files that have come into /dev/shm with this job and that no living process has mapped or open."""
        found = _shared_memory() - self._shared
        time.sleep(5)  # the semaphores of launchers, this one's and others', are cleared away
        held = set()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                maps = (process / "maps").read_text(encoding="utf-8")
                held.update(int(line.split()[4]) for line in maps.splitlines() if "/dev/shm/" in line)
                files = [file for file in (process / "fd").iterdir() if "/dev/shm/" in os.readlink(file)]
                held.update(file.stat().st_ino for file in files)
            except OSError:  # it has ended, or is another user's
                continue
        return sorted(name for name, number in found & _shared_memory() if number not in held)

    def log(self) -> str:
        """Return what the launcher and the workers have printed."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def end(self, seconds: float) -> None:
        """Ask the job to end, and note its status; None if it had to be killed: it hangs."""
        (self.folder / STOP).touch()
        try:
            self.status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End all processes of the job."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait()
        self._log.close()


def _shared_memory() -> set[tuple[str, int]]:
    """Return the names and inodes of the files in /dev/shm; a process may have one mapped under another name."""
    folder = Path("/dev/shm")
    return {(entry.name, entry.inode()) for entry in os.scandir(folder)} if folder.is_dir() else set()
