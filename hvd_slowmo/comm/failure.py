"""The end of a transport: after its error nothing more may be submitted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hvd_slowmo.comm.protocol import Comm

T = TypeVar("T")


class FailureLatch:
    """Remembers that a collective has failed.

    A collective submitted right after such an error can freeze the process, even while it ends (docs/design-notes.md).

    Args:
        library: whose collectives they are, for messages.
        rank: of this worker, for messages.
        error: makes the exceptions: of the type that a lost worker has with this library.

    Attributes:
        steps: returns the number of steps that this worker has made, for messages; None before it has started.

    Example:
        >>> latch = FailureLatch("Horovod", 0, RuntimeError)
        >>> latch.refuse_after_failure()
        >>> print(latch.lost("connection reset", "slowmo.ledger"))
        rank 0: the collective slowmo.ledger failed, most likely because another worker ended ...
        >>> latch.refuse_after_failure()
        Traceback (most recent call last):
        RuntimeError: rank 0: nothing more can be exchanged after Horovod's error (another worker ...
    """

    def __init__(self, library: str, rank: int, error: Callable[[str], Exception]) -> None:
        self.steps: Callable[[], int | None] = lambda: None
        self._library = library
        self._rank = rank
        self._error = error
        self._failure: str | None = None

    @property
    def failed(self) -> bool:
        """True once a worker was lost."""
        return self._failure is not None

    def refuse_after_failure(self) -> None:
        """Raise an error of the same type as the first one, after `lost` was called."""
        if self._failure is not None:
            raise self.again()

    def again(self) -> Exception:
        """Return the exception for whatever comes after the first error."""
        return self._error(
            f"rank {self._rank}: nothing more can be exchanged after {self._library}'s error ({self._failure}). End "
            "this process; the job can be resumed from its last checkpoint."
        )

    def lost(self, says: str, name: str | None = None, cause: str | None = None) -> Exception:
        """Remember an error of the library, and return the exception to raise in its place.

        Args:
            says: the library's own text.
            name: of the collective, where it is known.
            cause: the likely one.
        """
        cause = cause or "another worker ended or was killed; look at that worker's output"
        self._failure = f"{cause}: {says}"
        made = self.steps()
        steps = "" if made is None else f", after {made} steps"
        what = "a collective" if name is None else f"the collective {name}"
        return self._error(
            f"rank {self._rank}{steps}: {what} failed, most likely because {cause}. {self._library} says: {says}"
        )


def absence(absent: Sequence[int], limit: float | None) -> str | None:
    """Return the cause of a failure in words; None where it is not known who is missing.

    Args:
        absent: global ranks.
        limit: seconds that the others wait for a worker.

    Example:
        >>> absence((1,), None)
        'rank 1 ended, was killed or has not come to this exchange; look at the output there'
        >>> absence((1, 3), 30.0)
        'ranks 1, 3 ended, were killed or have not come within 30 s; look at the output there'
    """
    if not absent:
        return None
    several = len(absent) > 1
    who = f"rank{'s' * several} {', '.join(map(str, absent))}"
    were, have = ("were", "have") if several else ("was", "has")
    where = "to this exchange" if limit is None else f"within {limit:g} s"
    return f"{who} ended, {were} killed or {have} not come {where}; look at the output there"


def tell_steps(comm: Comm, owner: T, steps: Callable[[T], int | None]) -> None:
    """Let the errors of a transport say how many steps this worker has made.

    Args:
        comm: the workers; nothing is done for one without errors of its own.
        owner: of the steps; the errors do not keep it alive.
        steps: returns the owner's number of steps, None before the start.
    """
    reference = weakref.ref(owner)

    def made() -> int | None:
        found = reference()
        return None if found is None else steps(found)

    for each in (comm, comm.node):
        failures: Any = getattr(each, "failures", None)
        if failures is not None:
            failures.steps = made
