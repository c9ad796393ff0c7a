"""Messages between the soak and a worker: files in the job's directory."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from hvd_slowmo.errors import CheckpointError

STOP, OUTER_STEP = "stop", "outer step"  # files: asks the job to end; touched at each outer step
TAU = 8
SHORT_EPOCH = 4
"""Batches of a worker that is to wait in its join: others have ten at least. The averages come before."""


def digest(arrays: Iterable[NDArray[Any]]) -> str:
    """Return a text that two workers share if their arrays are bitwise equal."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]


class Diary:
    """One worker's entries, and the orders that it has been given.

    Args:
        folder: of the job.

    Attributes:
        count: batches of this epoch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = os.environ.get("HOROVOD_HOSTNAME", "alone")
        self._saved = folder / "saved.slowmo"
        self._stand = (0, 0)  # steps, own steps in the block
        self._short, self.count = False, 0

    def note(self, kind: str, **facts: Any) -> None:
        """Append an entry to this worker's file."""
        entry = {"kind": kind, "time": time.time(), "process": os.getpid(), "host": self.host, **facts}
        with (self.folder / f"{self.host}.jsonl").open("a", encoding="utf-8") as file:
            print(json.dumps(entry), file=file)
        if kind == "outer":
            (self.folder / OUTER_STEP).touch()

    def note_change(self, own: int, **facts: Any) -> None:
        """Note that this worker has come together with the others, where it stands, and which process it is."""
        self.note("change", own=own, before=self._stand, **facts)
        self.stand(facts["step"], own)
        (self.folder / f"process.{self.host}").write_text(str(os.getpid()), encoding="utf-8")

    def stand(self, steps: int, own: int) -> None:
        """Remember the steps, and this worker's own in the present block: it may not lose them."""
        self._stand = steps, own

    def note_join(self, **facts: Any) -> None:
        """Note the end of a join, where each process has the same in hand: what it holds, too."""
        process = psutil.Process()
        held = {"memory": process.memory_info().rss, "files": process.num_fds(), "threads": process.num_threads()}
        self.note("join", **facts, **held)
        self.stand(facts["step"], 0)  # its steps are in the mean now

    def ordered(self, what: str) -> bool:
        """Return whether this worker has the order, once."""
        order = self.folder / f"{what}.{self.host}"
        if not order.exists():
            return False
        order.unlink(missing_ok=True)
        self.note("obeyed", what=what)
        return True

    def hang_if_ordered(self) -> None:
        """Come to no exchange any more, if so ordered."""
        if self.ordered("hang"):
            time.sleep(3600)

    @property
    def stopping(self) -> bool:
        """True if the job is to end."""
        return (self.folder / STOP).exists()

    def start_slowly(self) -> None:
        """Wait, if this worker is to be a slow newcomer."""
        if self.ordered("slow"):
            time.sleep(20)

    def batches(self, epoch: int, rank: int) -> tuple[int, np.random.Generator]:
        """Return this worker's number of batches in an epoch, which differs between workers, and a generator."""
        rng = np.random.default_rng((epoch, rank))
        self._short = self.ordered("short")
        self.count = SHORT_EPOCH if self._short else int(rng.integers(10, 30))
        return self.count, rng

    def begin_join(self) -> None:
        """Tell that this worker waits for the others, if it was ordered to; its steps are theirs from now on."""
        self.stand(self._stand[0], 0)
        if self._short:
            (self.folder / f"joining.{self.host}").touch()

    def save(self, save: Callable[[Path], None], epoch: int) -> None:
        """Save, on a full disk if so ordered. A collective."""
        try:
            with _full_disk(self.ordered("full")):
                save(self._saved)
            self.note("save", epoch=epoch)
        except (OSError, ValueError) as error:
            self.note("unsaved", epoch=epoch, error=str(error))

    def load(self, load: Callable[[Path], None], mean: Callable[[float], float], epoch: int) -> None:
        """Load what was saved last, which may not fit. A collective."""
        if mean(float(self._saved.exists())) < 1:
            return
        self.stand(0, 0)
        try:
            load(self._saved)
            self.note("load", epoch=epoch)
        except (CheckpointError, ValueError) as error:  # of another number of workers, within a block
            self.note("unloaded", epoch=epoch, error=str(error))


@contextmanager
def _full_disk(now: bool) -> Iterator[None]:
    """Let no file grow, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if now:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of all workers; a line that is being written is left out."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):
                yield json.loads(line)


def rate(epoch: int) -> float:
    """Return the learning rate of an epoch."""
    return 0.03 + 0.01 * float(np.cos(epoch))
