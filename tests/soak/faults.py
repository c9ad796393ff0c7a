"""The faults of the soak, drawn at random: each does something to a worker or to the list of hosts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from soak import link

if TYPE_CHECKING:
    from soak.job import Job

HOSTS = ("localhost", "127.0.0.1", "127.1", "127.0.1", "0x7f.1", "0177.1", "0x7f.0.1", "0177.0.1", "2130706433")
"""Names of this machine, each a host to Horovod, which blocks that of a killed worker for a while."""

FEWEST, MOST = 2, 4
TIMEOUT_S = 20  # of an exchange
STOPPED_LONG_S = 4 * TIMEOUT_S  # the others wait for one limit, and the launcher for another one
SLOW_LINK_S = 20
JOIN_S = 20  # within which a worker whose epoch is short has come to its join


class Faults:
    """Does what a seed says.

    Args:
        job: to which it does it.
        seed: of the faults.

    Attributes:
        done: when and what, in words.
        ended: time at which the last one was over.
        slow_periods: begin and end of each time of a slow link.
    """

    def __init__(self, job: Job, seed: int) -> None:
        self._job = job
        self._rng = np.random.default_rng(seed)
        self.done: list[tuple[float, str]] = []
        self.slow_periods: list[tuple[float, float]] = []
        self.ended = 0.0
        self._kinds: tuple[Callable[[], str | None], ...] = (
            self.kill,
            self.kill,
            self.add,
            self.add,
            self.add_slowly,
            self.take_away,
            self.stop_shortly,
            self.stop_for_long,
            self.hang,
            self.spoil,
            self.overflow,
            self.fill_the_disk,
            self.kill_in_join,
            *([self.slow_link] if link.allowed() else []),
        )

    def next(self) -> str | None:
        """Do something, and return it in words; None where it can't be done now."""
        line = self._kinds[self._rng.integers(len(self._kinds))]()
        if line is not None:
            self.ended = time.time()
            self.done.append((self.ended, line))
        return line

    def kill(self) -> str | None:
        """SIGKILL, at a random moment of a step."""
        victim = self._victim(FEWEST + 1)
        if victim is None:
            return None
        time.sleep(float(self._rng.uniform(0, 0.2)))
        self._lose(victim)
        return f"killed {victim}"

    def kill_in_join(self) -> str | None:
        """SIGKILL to a worker that has no data left, while it answers the others from its join."""
        victim = self._victim(FEWEST + 1)
        if victim is None:
            return None
        joining = self._job.folder / f"joining.{victim}"
        joining.unlink(missing_ok=True)
        self._job.order("short", victim)
        end = time.monotonic() + JOIN_S
        while not joining.exists() and time.monotonic() < end:
            time.sleep(0.01)
        self._lose(victim)
        return f"killed {victim} in its join" if joining.exists() else f"killed {victim} before its join"

    def add(self) -> str | None:
        """A new host."""
        free = [host for host in HOSTS if host not in self._job.hosts and self._job.rested(host)]
        if len(self._job.hosts) >= MOST or not free:
            return None
        host = str(self._rng.choice(free))
        self._job.set_hosts([*self._job.hosts, host])
        return f"added {host}"

    def add_slowly(self) -> str | None:
        """A new host whose worker takes 20 s longer to start."""
        for host in HOSTS:
            if host not in self._job.hosts:
                self._job.order("slow", host)
        done = self.add()
        return None if done is None else f"{done}, slowly"

    def take_away(self) -> str | None:
        """A host that is announced to go."""
        victim = self._victim(FEWEST + 1)
        if victim is None:
            return None
        self._job.set_hosts([host for host in self._job.hosts if host != victim])
        return f"took {victim} away"

    def stop_shortly(self) -> str | None:
        """SIGSTOP for less than anybody's time limit."""
        victim = self._victim(FEWEST)
        if victim is None:
            return None
        self._signal(victim, signal.SIGSTOP)
        time.sleep(float(self._rng.uniform(1, 5)))
        self._signal(victim, signal.SIGCONT)
        return f"stopped {victim} for a moment"

    def stop_for_long(self) -> str | None:
        """SIGSTOP: the launcher ends the worker, where the others have noticed that it is missing."""
        victim = self._victim(FEWEST + 1)
        if victim is None:
            return None
        self._signal(victim, signal.SIGSTOP)
        end = time.monotonic() + STOPPED_LONG_S
        while victim in self._job.training() and time.monotonic() < end:
            time.sleep(1)
        ended = victim not in self._job.training()
        self._lose(victim)
        return f"stopped {victim} for good, {'which the launcher has ended' if ended else 'and killed it'}"

    def hang(self) -> str | None:
        """A worker that comes to no exchange: the others go on without it, and it ends itself."""
        victim = self._victim(FEWEST + 1)
        if victim is None:
            return None
        self._job.order("hang", victim)
        time.sleep(3 * TIMEOUT_S)
        self._job.set_hosts([host for host in self._job.hosts if host != victim])
        return f"let {victim} hang"

    def spoil(self) -> str | None:
        """Gradients that are NaN."""
        return self._ordered("nan")

    def overflow(self) -> str | None:
        """Scaled gradients that are infinite: the scaler skips the step."""
        return self._ordered("overflow")

    def slow_link(self) -> str:
        """A slow link, for a while."""
        began = time.time()
        link.slow_down()
        time.sleep(SLOW_LINK_S)
        link.set_free()
        self.slow_periods.append((began, time.time()))
        return f"a link of {link.RATE} for {SLOW_LINK_S} s"

    def fill_the_disk(self) -> str | None:
        """A save that finds no room."""
        return self._ordered("full")

    def _ordered(self, what: str) -> str | None:
        victim = self._victim(FEWEST)
        if victim is None:
            return None
        self._job.order(what, victim)
        return f"{what} on {victim}"

    def _victim(self, fewest: int) -> str | None:
        """Return a worker that trains, where as many do."""
        alive = self._job.training()
        return str(self._rng.choice(sorted(alive))) if len(alive) >= fewest else None

    def _lose(self, victim: str) -> None:
        """Kill a worker, and take its host off the list."""
        self._signal(victim, signal.SIGKILL)
        self._job.set_hosts([host for host in self._job.hosts if host != victim])

    def _signal(self, host: str, number: int) -> None:
        process = self._job.training().get(host)
        if process is not None:
            os.kill(process, number)
