"""A clock of each thread's own, which moves only when it is told to, in the place of the module `time`."""

from __future__ import annotations

import threading


class OwnTime(threading.local):
    """`time` for a module under test; worker threads have a clock each."""

    def __init__(self) -> None:
        self.now = 0.0
        self.worked = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.worked

    def pass_by(self, seconds: float, work: float = 0.0) -> None:
        """Let time pass, of which the processor works for a part."""
        self.now += seconds
        self.worked += work
