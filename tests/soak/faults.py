"""The faults of the soak, in random order: each does something to a worker, to the list of hosts or to the link."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from soak import link

if TYPE_CHECKING:
    from soak.job import Job

HOSTS = ("localhost", "127.0.0.1", "127.1", "127.0.1", "0x7f.1", "0177.1", "0x7f.0.1", "0177.0.1", "2130706433")
"""Names of this machine, each a host to Horovod, which blocks that of a killed worker for a while."""

FEWEST, MOST = 2, 4
TIMEOUT_S = 20  # of an exchange
SLOW, FREE = f"the link at {link.RATE}", "the link free again"
STOPPED_LONG_S = 4 * TIMEOUT_S  # the others wait for one limit, and the launcher for another one


class Faults:
    """Does what a seed says: all kinds, in random order, and then again. A kind that can't be had now comes later.

    Args:
        job: to which it does it.
        seed: of the faults.
    """

    def __init__(self, job: Job, seed: int) -> None:
        self._job = job
        self._rng = np.random.default_rng(seed)
        self._due: list[Callable[[], str | None]] = []
        self._slow = False
        losses = [self.kill, self.kill, self.kill_in_join, self.take_away, self.take_away_in_join]
        self._kinds: tuple[Callable[[], str | None], ...] = (
            *losses,
            self.stop_for_long,
            self.hang,
            *[self.add] * 5,
            *[self.add_slowly] * 2,
            self.stop_shortly,
            self.spoil,
            self.overflow,
            self.fill_the_disk,
            *[self.change_the_link] * 2 * link.allowed(),
        )

    def next(self) -> str | None:
        """Do something, and return it in words; None where nothing can be done now."""
        for _ in range(2):
            for place, kind in enumerate(self._due):
                line = kind()
                if line is not None:
                    del self._due[place]
                    return line
            self._due += [self._kinds[n] for n in self._rng.permutation(len(self._kinds))]
        return None

    def kill(self) -> str | None:
        """SIGKILL, at a random moment of a step."""
        victim = self._victim(FEWEST + 1)
        if victim is None:
            return None
        time.sleep(float(self._rng.uniform(0, 0.2)))
        self._lose(victim)
        return f"killed {victim}"

    def kill_in_join(self) -> str | None:
        """SIGKILL of a worker that waits for the others in its join."""
        victim = self._victim(FEWEST + 1)
        if victim is None or not self._job.joins(victim):
            return None
        self._lose(victim)
        return f"killed {victim} in a join"

    def take_away(self) -> str | None:
        """A host that is announced to go."""
        victim = self._victim(FEWEST + 1)
        if victim is None:
            return None
        self._job.set_hosts([host for host in self._job.hosts if host != victim])
        return f"took {victim} away"

    def take_away_in_join(self) -> str | None:
        """A host that is announced to go while its worker waits for the others in its join."""
        victim = self._victim(FEWEST + 1)
        if victim is None or not self._job.joins(victim):
            return None
        self._job.set_hosts([host for host in self._job.hosts if host != victim])
        return f"took {victim} away in a join"

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
        return f"stopped {victim} for good, and {'the launcher has ended it' if ended else 'killed it'}"

    def hang(self) -> str | None:
        """A worker that comes to no exchange: the others go on without it, and it ends itself."""
        victim = self._victim(FEWEST + 1)
        if victim is None:
            return None
        self._job.order("hang", victim)
        time.sleep(3 * TIMEOUT_S)
        self._job.set_hosts([host for host in self._job.hosts if host != victim])
        return f"let {victim} hang"

    def add(self) -> str | None:
        """A new host."""
        host = self._free()
        if host is None:
            return None
        self._job.set_hosts([*self._job.hosts, host])
        return f"added {host}"

    def add_slowly(self) -> str | None:
        """A new host whose worker takes 20 s longer to start."""
        host = self._free()
        if host is None:
            return None
        self._job.order("slow", host)
        self._job.set_hosts([*self._job.hosts, host])
        return f"added {host}, slowly"

    def stop_shortly(self) -> str | None:
        """SIGSTOP for less than anybody's time limit."""
        victim = self._victim(FEWEST)
        if victim is None:
            return None
        self._signal(victim, signal.SIGSTOP)
        time.sleep(float(self._rng.uniform(1, 5)))
        self._signal(victim, signal.SIGCONT)
        return f"stopped {victim} for a moment"

    def spoil(self) -> str | None:
        """A worker whose parameters become NaN."""
        return self._ordered("nan")

    def overflow(self) -> str | None:
        """Gradients that are infinite: the loss scaler skips the step."""
        return self._ordered("overflow")

    def fill_the_disk(self) -> str | None:
        """A save that finds no room."""
        return self._ordered("full")

    def change_the_link(self) -> str | None:
        """A slow link from now on, or again the fast one."""
        self._slow = not self._slow
        if self._slow:
            link.slow_down()
            return SLOW
        link.set_free()
        return FREE

    def end(self) -> None:
        """Leave the link as it was."""
        if self._slow:
            self.change_the_link()

    def _ordered(self, what: str) -> str | None:
        victim = self._victim(FEWEST)
        if victim is None:
            return None
        self._job.order(what, victim)
        return f"{what} on {victim}"

    def _free(self) -> str | None:
        """Return a host that can be added, where there are not too many."""
        free = [host for host in HOSTS if host not in self._job.hosts and self._job.rested(host)]
        return str(self._rng.choice(free)) if free and len(self._job.hosts) < MOST else None

    def _victim(self, fewest: int) -> str | None:
        """Return a worker that trains, where as many do."""
        alive = self._job.training()
        return str(self._rng.choice(sorted(alive))) if len(alive) >= fewest else None

    def _lose(self, host: str) -> None:
        self._signal(host, signal.SIGKILL)
        self._job.set_hosts([each for each in self._job.hosts if each != host])

    def _signal(self, host: str, number: int) -> None:
        process = self._job.training().get(host)
        if process is not None:
            os.kill(process, number)


def slow_periods(done: Sequence[tuple[float, str]]) -> list[tuple[float, float]]:
    """Return the periods in which the link was slow, of what was done when; the last one may last to the end."""
    periods, began = [], None
    for moment, line in done:
        if line == SLOW:
            began = moment
        elif line == FREE and began is not None:
            periods.append((began, moment))
            began = None
    return periods if began is None else [*periods, (began, float("inf"))]
