"""A worker that hangs ends once the others have waited for it, and no other does."""

import threading
import time

from hvd_slowmo.comm.watchdog import Watchdog


def watched(waits, seconds, training=True, steps=lambda: 3):
    """Return whether a watchdog with a limit of 0.2 s has ended its process within some seconds."""
    ended = threading.Event()
    watchdog = Watchdog(0.2, waits, steps, ended.set, pause=0.02)
    watchdog.training(training)
    watchdog.start()
    found = ended.wait(seconds)
    watchdog.stop()
    return found


def test_it_ends_a_worker_for_which_the_others_wait():
    assert watched(lambda: True, 10)


def test_it_lets_a_worker_be_for_which_nobody_waits():
    assert not watched(lambda: False, 0.6)


def test_it_lets_a_worker_be_that_has_come_to_the_others():
    assert not watched(lambda: True, 0.6, training=False)


def test_it_lets_a_worker_be_that_takes_steps():
    """It will come to an exchange, at the end of a block that is longer than the limit."""
    started = time.monotonic()
    assert not watched(lambda: True, 0.8, steps=lambda: int((time.monotonic() - started) / 0.1))


def test_a_new_wait_begins_anew():
    started = time.monotonic()
    assert not watched(lambda: (time.monotonic() - started) % 0.15 < 0.1, 0.8)
