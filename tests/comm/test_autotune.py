"""The warning about Horovod's autotuning: over Horovod with several workers, on rank 0, once."""

import sys
import types

import pytest

from hvd_slowmo.comm import autotune
from hvd_slowmo.comm.autotune import VARIABLE, autotuned
from hvd_slowmo.comm.horovod import Workers


class Set:
    """A process set."""

    ranks = None

    def __init__(self, size):
        self.size = lambda: size

    def included(self):
        return True


@pytest.fixture
def connect(monkeypatch):
    """connect(size, rank, value): connect one rank of so many workers, with this value of the variable."""
    monkeypatch.setattr(autotune, "_told", False)

    def connect(size, rank, value):
        if value is None:
            monkeypatch.delenv(VARIABLE, raising=False)
        else:
            monkeypatch.setenv(VARIABLE, value)
        horovod = types.SimpleNamespace(
            is_initialized=lambda: True, size=lambda: size, rank=lambda: rank, global_process_set=Set(size)
        )
        monkeypatch.setitem(sys.modules, "horovod_of_this_test", horovod)
        Workers("horovod_of_this_test", "PyTorch", "hvd_slowmo.torch", lambda members, node: members).connect()

    return connect


# By strtol of C, with which Horovod reads the variable.
@pytest.mark.parametrize(
    ("value", "tunes"),
    [("1", True), (" 2x", True), ("+1", True), ("0", False), ("", False), ("true", False), ("-1", False)],
)
def test_the_variable_is_read_as_horovod_reads_it(value, tunes):
    assert autotuned({VARIABLE: value}) is tunes


def test_rank_0_of_several_workers_warns_once(connect, caplog):
    connect(2, 0, "1")
    connect(2, 0, "1")  # a second optimizer
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "while the job trains (HOROVOD_AUTOTUNE=1)" in record.getMessage()
    assert "Start the job with --no-autotune, or remove the variable." in record.getMessage()


@pytest.mark.parametrize(("size", "rank", "value"), [(2, 1, "1"), (1, 0, "1"), (2, 0, "0"), (2, 0, None)])
def test_nobody_else_warns(connect, caplog, size, rank, value):
    connect(size, rank, value)
    assert not caplog.records
