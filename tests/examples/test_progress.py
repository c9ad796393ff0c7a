"""The progress of the examples: lines in a pipe or a file, a bar on a terminal, and the time left."""

import io

import progress
import pytest


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run(total, seconds_per_step, skipped=0, rank=0, text=""):
    """Return the lines that a run prints into a pipe."""
    clock, stream = Clock(), io.StringIO()
    with progress.Progress(total, rank, stream=stream, clock=clock) as shown:
        shown.describe(text)
        shown.skip(skipped)
        for _ in range(total - skipped):
            clock.now += seconds_per_step
            shown.update()
    assert "\r" not in stream.getvalue()
    return stream.getvalue().splitlines()


def test_a_pipe_gets_a_line_every_few_seconds_with_the_time_left():
    assert run(10, 2.0, text="slowmo, seed 0") == [
        "slowmo, seed 0: 1 of 10 steps, 10 %",
        "slowmo, seed 0: 4 of 10 steps, 40 %, 0:12 left",
        "slowmo, seed 0: 7 of 10 steps, 70 %, 0:06 left",
        "10 of 10 steps in 0:20",
    ]


def test_a_run_of_hours_has_few_lines():
    lines = run(10_000, 10.0)
    assert 100 < len(lines) < 400
    assert lines[-1] == "10000 of 10000 steps in 27:46:40"


def test_steps_of_an_earlier_run_do_not_count_for_the_time_left():
    lines = run(10, 5.0, skipped=7)
    assert lines == ["8 of 10 steps, 80 %", "9 of 10 steps, 90 %, 0:05 left", "10 of 10 steps in 0:15"]


def test_the_first_steps_with_all_that_they_wait_for_do_not_count_for_the_time_left():
    clock, stream = Clock(), io.StringIO()
    with progress.Progress(1000, stream=stream, clock=clock) as shown:
        clock.now = 20.0  # imports, connections, traces
        shown.update()
        clock.now = 25.0
        shown.update(99)
    assert stream.getvalue().splitlines()[:2] == ["1 of 1000 steps, 0 %", "100 of 1000 steps, 10 %, 0:45 left"]


def test_other_ranks_show_nothing():
    assert run(10, 2.0, rank=1) == []


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with progress.Progress(4, stream=stream) as shown:
        shown.describe("slowmo")
        shown.skip(2)
        shown.update(2)
    assert "slowmo: 100%" in stream.getvalue()
    assert "4/4" in stream.getvalue()
    with progress.Progress(4, 1, stream=stream) as shown:
        shown.update(4)
    assert stream.getvalue().count("4/4") == 1


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (90_061, "25:01:01")])
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
