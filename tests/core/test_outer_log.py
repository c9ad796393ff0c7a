"""Lines about outer steps: which ones get one, on rank 0 alone, and with which numbers."""

import copy
import logging

import keras
import numpy as np
import pytest
import torch

import hvd_slowmo.tf
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo

SEEN = [1, 2, 5, 10, 20, 50, 100, 200, 300]


def lines(caplog):
    """Return the messages about outer steps."""
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    return [line for line in found if ": outer step " in line]


def numbers(caplog):
    """Return the number of the outer step and of the inner step in each line."""
    words = [line.partition(": outer step ")[2].partition(";")[0].split(", step ") for line in lines(caplog)]
    return [(int(outer), int(inner)) for outer, inner in words]


def train(comm, steps, state=None, **settings):
    """Train one weight, and return the optimizer's state."""
    torch.manual_seed(comm.rank)
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.01), model, comm=comm, name="line", **settings)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((1, 1), 1.0 + comm.rank + step % 3)).square().sum().backward()
        optimizer.step()
    return optimizer.state_dict(), optimizer.metrics() if settings.get("metrics") else None


def run(caplog, *arguments, **settings):
    with caplog.at_level(logging.INFO, "hvd_slowmo"):
        return ThreadWorld(2).run(lambda comm: train(comm, *arguments, **settings))


@pytest.mark.slow
def test_the_first_ones_and_then_every_hundredth_have_a_line_on_rank_0_alone(caplog):
    run(caplog, 700, tau=2)
    assert numbers(caplog) == [(number, 2 * number) for number in SEEN]


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [
        ({"warmup_steps": 5, "tau": 3}, 5 + 3 * 6, [(1, 8), (2, 11), (5, 20)]),
        ({"tau": 4, "fragments": 2, "delay": 1}, 4 * 2 + 1, [(1, 5), (2, 9)]),  # a step late
        ({"tau": 2, "average": False, "gossip": hvd_slowmo.tf.SGP()}, 5, [(1, 2), (2, 4)]),
        ({"tau": None, "beta": 0, "gradients": "all"}, 70, []),  # no outer steps
    ],
)
def test_the_count_follows_from_the_settings_and_the_steps(caplog, settings, steps, expected):
    run(caplog, steps, **settings)
    assert numbers(caplog) == expected


def test_a_resumed_run_goes_on_counting(caplog):
    (state, _), _ = run(caplog, 14, tau=2)
    caplog.clear()
    run(caplog, 8, state, tau=2)
    assert numbers(caplog) == [(8, 16), (10, 20)]


def test_an_earlier_state_is_counted_from_there(caplog):
    def work(comm):
        model = torch.nn.Linear(1, 1)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.01), model, tau=1, comm=comm)
        for _ in range(6):
            optimizer.step()
            if optimizer.steps == 2:
                early = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(early)
        for _ in range(4):
            optimizer.step()

    with caplog.at_level(logging.INFO, "hvd_slowmo"):
        ThreadWorld(1).run(work)
    assert numbers(caplog) == [(1, 1), (2, 2), (5, 5), (5, 5)]


def test_without_a_listener_nothing_is_shown(caplog):
    ThreadWorld(2).run(lambda comm: train(comm, 4, tau=2))
    assert lines(caplog) == []


def test_a_line_has_traffic_and_measurements(caplog):
    (_, metrics), _ = run(caplog, 4, tau=2, metrics=True)
    line = lines(caplog)[-1]
    assert line.startswith("line: outer step 2, step 4; ")
    assert f"; divergence {metrics.divergence:.3g}, norm of Delta {metrics.delta_norm:.3g}, of v " in line
    assert f", cosine {metrics.cosine:.3g}, waited " in line
    assert metrics.divergence > 0
    caplog.clear()
    run(caplog, 2, tau=2)
    assert lines(caplog)[0].startswith("line: outer step 1, step 2; ")
    assert lines(caplog)[0].endswith(" bytes sent")


@pytest.mark.slow
def test_keras_logs_alike(caplog):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    optimizer = hvd_slowmo.tf.SlowMo(keras.optimizers.SGD(0.01), tau=2, metrics=True, name="line")
    model.compile(optimizer, "mse")
    x = np.ones((11, 1), np.float32)
    with caplog.at_level(logging.INFO, "hvd_slowmo"):
        model.fit(x, x, batch_size=1, verbose=0, callbacks=[hvd_slowmo.tf.SlowMoCallback()])
    assert numbers(caplog) == [(1, 2), (2, 4), (5, 10)]
    assert f"; divergence 0, norm of Delta {optimizer.metrics().delta_norm:.3g}, of v " in lines(caplog)[-1]
    assert "sent" not in lines(caplog)[-1]  # a single worker sends nothing
