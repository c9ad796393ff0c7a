"""The end of a transport: after its error nothing more may be submitted."""

from __future__ import annotations

from collections.abc import Callable


class FailureLatch:
    """Remembers that a collective has failed.

    A collective submitted right after such an error can freeze the process, even while it ends (docs/design-notes.md).

    Args:
        library: whose collectives they are, for messages.
        rank: of this worker, for messages.
        error: makes the exceptions: of the type that a lost worker has with this library.

    Example:
        >>> latch = FailureLatch("Horovod", 0, RuntimeError)
        >>> latch.refuse_after_failure()
        >>> print(latch.lost("connection reset"))
        rank 0: a collective failed, most likely because another worker ended ... Horovod says: connection reset
        >>> latch.refuse_after_failure()
        Traceback (most recent call last):
        RuntimeError: rank 0: nothing more can be exchanged after Horovod's error (another worker ...
    """

    def __init__(self, library: str, rank: int, error: Callable[[str], Exception]) -> None:
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

    def lost(
        self, says: str, cause: str = "another worker ended or was killed; look at that worker's output"
    ) -> Exception:
        """Remember an error of the library, and return the exception to raise in its place.

        Args:
            says: the library's own text.
            cause: the likely one.
        """
        self._failure = f"{cause}: {says}"
        return self._error(
            f"rank {self._rank}: a collective failed, most likely because {cause}. {self._library} says: {says}"
        )
