"""The end of a worker that hangs while the others of an elastic job go on without it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import NoReturn
from urllib.error import HTTPError

from hvd_slowmo.comm.rendezvous import Rendezvous

_PAUSE_S = 2.0
_GONE = 410

logger = logging.getLogger("hvd_slowmo")


class Watchdog:
    """Ends this process once the others do without it, and have waited as long as they may for its next step.

    The launcher gives nobody an assignment before each worker has asked for one or has ended, and one that hangs does
    neither. One that takes steps will come to an exchange, and find the others gone.

    Args:
        limit: seconds that the others wait.
        others_wait: returns whether they do.
        steps: returns how many steps this worker has made.
        end: ends the process.
        pause: seconds between two looks.
    """

    def __init__(
        self,
        limit: float,
        others_wait: Callable[[], bool],
        steps: Callable[[], int],
        end: Callable[[], None] | None = None,
        pause: float = _PAUSE_S,
    ) -> None:
        self._limit, self._others_wait, self._steps = limit, others_wait, steps
        self._end, self._pause = end or _end, pause
        self._training = threading.Event()
        self._over = threading.Event()

    def start(self) -> None:
        """Begin to look, in a thread."""
        threading.Thread(target=self._watch, name="slowmo watchdog", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def training(self, now: bool) -> None:
        """Note that this worker trains, or that it comes to the others."""
        if now:
            self._training.set()
        else:
            self._training.clear()

    def _watch(self) -> None:
        since, before = None, -1
        while not self._over.wait(self._pause):
            steps = self._steps()
            if not (self._training.is_set() and self._others_wait()):
                since = None
            elif since is None or steps != before:
                since, before = time.monotonic(), steps
            elif time.monotonic() - since > self._limit and self._training.is_set():
                logger.critical(
                    "this worker has made no step for %.0f s, while the others wait to go on without it: it ends.",
                    self._limit,
                )
                self._end()
                return


def others_wait() -> bool:
    """Return whether other workers of the elastic job have asked for new assignments, or have ended."""
    try:
        Rendezvous().get("slowmo/present")
    except HTTPError as error:
        return error.code == _GONE
    except OSError:  # the launcher is busy, or gone
        return False
    return False


def _end() -> NoReturn:
    logging.shutdown()
    os._exit(1)  # the main thread can't be reached
