"""Numbers that Python can't turn into what is needed are refused where they come in, with their name."""

import math

import pytest

from hvd_slowmo import SlowMoConfig
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.core.average.metric_mean import mean_of


class Raises:
    def __float__(self):
        raise RuntimeError("no number")

    __index__ = __float__


VALUES = [10**5000, -(10**400), math.inf, math.nan, -1e308, "3", b"3", bytearray(b"3"), Raises(), object(), [3], True]


@pytest.mark.parametrize("name", ["tau", "alpha", "beta", "warmup_steps"])
@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_settings(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^`{name}` must be .*Received: {name}=") as error:
        SlowMoConfig(**{name: value})
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    "value", [value for value in VALUES if value is not True], ids=lambda value: type(value).__name__
)
def test_weights_are_refused_on_every_rank(value):
    def work(comm):
        with pytest.raises((TypeError, ValueError), match="`weight` must be a finite number >= 0"):
            mean_of(comm, 1.0, value if comm.rank == 1 else 1.0)

    ThreadWorld(2).run(work)
