"""An error on one worker is one type on all of them, and its text names that worker's rank."""

import errno

import pytest

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.core.start.handshake import agreed
from hvd_slowmo.errors import CheckpointError


class OwnError(TypeError):
    """An error of the user's own, which can't be made from a text alone."""

    def __init__(self, number, unit):
        super().__init__(f"{number} {unit}")


def outcomes(errors):
    """Return what each worker raises where some of them have met an error, by rank."""

    def make(rank):
        if rank in errors:
            raise errors[rank]
        return True, {}

    world = ThreadWorld(3)
    return world.run(lambda comm: agreed(ScopedComm(comm, "s"), lambda: make(comm.rank), {}), return_exceptions=True)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (TypeError("no number"), TypeError, "no number"),
        (ValueError("too small"), ValueError, "too small"),
        (CheckpointError("damaged"), CheckpointError, "damaged"),
        (RuntimeError("too early"), RuntimeError, "too early"),
        (MemoryError("too large"), MemoryError, "too large"),
        (PermissionError(errno.EACCES, "Permission denied"), OSError, "[Errno 13] Permission denied"),
        (OwnError(3, "steps"), TypeError, "3 steps"),
        (KeyError("weight"), ValueError, "KeyError: 'weight'"),
    ],
)
def test_one_workers_error_is_one_type_on_all(error, kind, text):
    found = outcomes({1: error})
    assert [(type(each), str(each)) for each in found] == [(kind, f"s: rank 1: {text}")] * 3
    assert found[1].__cause__ is error


def test_the_number_of_a_systems_error_reaches_all_workers():
    assert [each.errno for each in outcomes({2: OSError(errno.ENOSPC, "full")})] == [errno.ENOSPC] * 3


def test_the_first_ranks_type_is_that_of_several_errors():
    found = outcomes({1: TypeError("no number"), 2: ValueError("too small")})
    assert [(type(each), str(each)) for each in found] == [
        (TypeError, "s: rank 1: no number; rank 2: too small"),
    ] * 3


def test_an_error_that_all_workers_have_met_is_raised_as_it_is():
    errors = {rank: OwnError(3, "steps") for rank in range(3)}
    assert outcomes(errors) == list(errors.values())
