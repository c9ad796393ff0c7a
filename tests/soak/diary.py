"""Messages between the soak and a worker: files in the job's directory."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

STOP = "stop"
TAU = 8


def digest(arrays: Iterable[NDArray[Any]]) -> str:
    """Return a text that two workers share if their arrays are bitwise equal."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]


class Diary:
    """One worker's entries, and the orders that it has been given.

    Args:
        folder: of the job.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = os.environ.get("HOROVOD_HOSTNAME", "alone")

    def note(self, kind: str, **facts: Any) -> None:
        """Append an entry to this worker's file."""
        entry = {"kind": kind, "time": time.time(), "process": os.getpid(), "host": self.host, **facts}
        with (self.folder / f"{self.host}.jsonl").open("a", encoding="utf-8") as file:
            print(json.dumps(entry), file=file)

    def note_change(self, **facts: Any) -> None:
        """Note that this worker has come together with the others, and which process it is."""
        self.note("change", **facts)
        (self.folder / f"process.{self.host}").write_text(str(os.getpid()), encoding="utf-8")

    def ordered(self, what: str) -> bool:
        """Return whether this worker has the order, once."""
        order = self.folder / f"{what}.{self.host}"
        if not order.exists():
            return False
        order.unlink(missing_ok=True)
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


def entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of all workers; a line that is being written is left out."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):
                yield json.loads(line)


def batches_of(epoch: int, rank: int) -> tuple[int, np.random.Generator]:
    """Return the number of batches of a worker in an epoch, which differs between workers, and a generator for them."""
    rng = np.random.default_rng((epoch, rank))
    return int(rng.integers(10, 30)), rng


def rate(epoch: int) -> float:
    """Return the learning rate of an epoch."""
    return 0.03 + 0.01 * float(np.cos(epoch))
