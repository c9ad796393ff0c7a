"""Every wait for a worker that does not come has an end, and an error that names the worker and the step."""

import os
import re
import subprocess
import sys

import pytest

from hvd_slowmo.comm.absence import absent_ranks
from hvd_slowmo.comm.rendezvous import RendezvousBoard
from hvd_slowmo.comm.time_limit import horovods_limit, limit_horovod, time_limit
from support.elastic import hvd_slowmo_run
from support.installation import ROOT

TORCH = """
import sys, time, torch
import hvd_slowmo.torch as slowmo
slowmo.init(timeout=10)
model = torch.nn.Linear(3, 1)
optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, tau=2)
for step in range(6):
    if step == 3 and slowmo.rank() == 1:
        time.sleep(60)  # a data loader that hangs
    optimizer.zero_grad()
    model(torch.ones(8, 3)).square().mean().backward()
    optimizer.step()
"""

KERAS = """
import time, keras, numpy as np
import horovod.tensorflow as hvd
import hvd_slowmo.tf as slowmo
slowmo.init(timeout=10)
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile(slowmo.SlowMo("sgd", tau=2), "mse")
class Hang(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 3 and hvd.rank() == 1:
            time.sleep(60)
x = np.ones((12, 3), "float32")
model.fit(x, x[:, :1], batch_size=2, verbose=0, callbacks=[slowmo.SlowMoCallback(), Hang()])
"""

CAUSE = r"most likely because rank 1 ended, was killed or has not come within 10 s; look at the output there"


@pytest.mark.parametrize(
    ("timeout", "environment", "seconds"),
    [
        (None, {}, None),
        (None, {"HOROVOD_ELASTIC": "1"}, 300.0),
        (None, {"HOROVOD_ELASTIC": "1", "HVD_SLOWMO_TIMEOUT": "0"}, None),
        (None, {"HOROVOD_ELASTIC": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "3600"}, None),
        (None, {"HOROVOD_ELASTIC": "1", "HOROVOD_STALL_CHECK_DISABLE": "1"}, None),
        (None, {"HVD_SLOWMO_TIMEOUT": "12.5"}, 12.5),
        (7, {"HVD_SLOWMO_TIMEOUT": "12.5"}, 7.0),
    ],
)
def test_the_limit(timeout, environment, seconds):
    assert time_limit(timeout, environment) == seconds


@pytest.mark.parametrize("timeout", [0, -1, 0.5, float("nan"), float("inf"), 10**400])
def test_a_limit_that_none_can_keep(timeout):
    with pytest.raises(ValueError, match=r"`timeout` must be at least 1 second. Received: "):
        time_limit(timeout, {})


@pytest.mark.parametrize("timeout", ["30", True, [30]])
def test_a_limit_that_is_no_number(timeout):
    with pytest.raises(TypeError, match=r"`timeout` must be a number of seconds, or None. Received: "):
        time_limit(timeout, {})


@pytest.mark.parametrize("text", ["soon", "", "nan", "-3"])
def test_a_variable_that_is_no_limit(text):
    with pytest.raises(ValueError, match=r"HVD_SLOWMO_TIMEOUT must be .*Received: "):
        time_limit(None, {"HVD_SLOWMO_TIMEOUT": text})


@pytest.mark.parametrize(
    ("limit", "check", "shutdown", "gloo"), [(1, "1", "1", "30"), (30, "7", "30", "30"), (900, "60", "900", "900")]
)
def test_horovods_variables(limit, check, shutdown, gloo):
    environment = {"HOROVOD_STALL_CHECK_DISABLE": "1"}
    limit_horovod(limit, environment)
    assert environment == {
        "HOROVOD_STALL_CHECK_DISABLE": "0",
        "HOROVOD_STALL_CHECK_TIME_SECONDS": check,
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": shutdown,
        "HOROVOD_GLOO_TIMEOUT_SECONDS": gloo,
    }


def test_a_longer_limit_of_gloo_stays():
    environment = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "600"}
    limit_horovod(60, environment)
    assert environment["HOROVOD_GLOO_TIMEOUT_SECONDS"] == "600"


@pytest.mark.parametrize(
    ("text", "seconds"), [("120", 120), (" +5 s", 5), ("2.9", 2), ("soon", None), ("", None), ("-3", None), ("0", None)]
)
def test_horovods_own_limit_is_read_as_horovod_reads_it(text, seconds):
    assert horovods_limit({"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": text}) == seconds
    environment = {"HOROVOD_GLOO_TIMEOUT_SECONDS": text}
    limit_horovod(1, environment)
    assert environment["HOROVOD_GLOO_TIMEOUT_SECONDS"] == str(max(30, seconds or 0))


def test_a_number_of_many_digits_is_for_ever():
    assert horovods_limit({"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "9" * 400}) == 999_999_999


@pytest.mark.slow
def test_who_reports_to_horovodruns_server_is_not_missing():
    http_server = pytest.importorskip("horovod.runner.http.http_server")
    server = http_server.RendezvousServer()
    address = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server.start())}
    try:
        board = RendezvousBoard(address)
        board.mark("0_2_3/3")
        assert absent_ranks((0, 2, 3), 0, board) == (2,)
    finally:
        server.stop()
        server._httpd.server_close()


def test_a_board_that_is_gone_tells_nothing():
    board = RendezvousBoard({"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "9"})
    assert absent_ranks((0, 1), 0, board) == ()


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.parametrize("script", [TORCH, pytest.param(KERAS, marks=pytest.mark.thorough)], ids=["torch", "keras"])
def test_a_worker_that_hangs_under_horovodrun(tmp_path, script):
    job = hvd_slowmo_run(tmp_path, script, 3)
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    for rank in (0, 2):
        assert re.search(rf"rank {rank}, after 3 steps: (a|the) collective.* failed, {CAUSE}", errors), errors[-3000:]
    assert re.search(r"hvd-slowmo run: rank [02] ended with exit status 1;", errors)


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.thorough
def test_a_worker_that_hangs_under_torchrun(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TORCH)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", script]
    path = f"{ROOT}:{ROOT / 'torch'}"
    job = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert job.returncode != 0
    assert re.search(rf"rank [02], after 3 steps: a collective failed, {CAUSE}", job.stderr), job.stderr[-3000:]
