"""The line at the start: method, workers, traffic and memory, once per optimizer and on rank 0 alone."""

import logging

import pytest
import torch
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.start.announcement import method
from hvd_slowmo.torch import SlowMo


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SlowMoConfig(), "local SGD with slow momentum (tau=12, alpha=1, beta=0.5)"),
        (SlowMoConfig.local_sgd(8), "local SGD (tau=8)"),
        (SlowMoConfig.lookahead(5), "local SGD with a slow learning rate (tau=5, alpha=0.5)"),
        (SlowMoConfig.diloco(50), "local SGD with Nesterov slow momentum (tau=50, alpha=0.7, beta=0.9)"),
        (SlowMoConfig.ar_sgd(), "AR-SGD"),
        (SlowMoConfig(gradients="all"), "AR-SGD with slow momentum (tau=12, alpha=1, beta=0.5)"),
        (SlowMoConfig(gradients="node"), "local SGD between nodes with slow momentum (tau=12, alpha=1, beta=0.5)"),
        (SlowMoConfig.sgp(), "SGP"),
        (SlowMoConfig.dpsgd(tau=4, beta=0), "D-PSGD (tau=4)"),
        (
            SlowMoConfig.osgp(tau=4, average=False, warmup_steps=9),
            "SGP with overlap (OSGP) with slow momentum without its average (tau=4, alpha=1, beta=0.5) after 9 steps "
            "of AR-SGD",
        ),
    ],
)
def test_methods_have_the_fields_names(config, words):
    assert method(config) == words


# Linear(2, 1) and BatchNorm1d(1): 5 parameters of 4 bytes, and 3 statistics of 8.
@pytest.mark.parametrize(
    ("config", "traffic"),
    [
        (SlowMoConfig(), "44 bytes per outer step, 40 bytes of memory"),
        (SlowMoConfig(tau=None, gradients="all", beta=0), "20 bytes of gradients per step, 0 bytes of memory"),
        (SlowMoConfig.osgp(tau=3), "20 bytes per gossip message, 44 bytes per outer step, 80 bytes of memory"),
        (SlowMoConfig.sgp(tau=3, average=False), "on each 20 bytes per gossip message, 40 bytes of memory"),
    ],
)
def test_one_line_tells_traffic_and_memory(caplog, config, traffic):
    def work(comm):
        model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
        return SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, config, comm=comm, name="d").bytes_sent

    with caplog.at_level(logging.INFO, "hvd_slowmo"):
        ThreadWorld(2).run(work)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert line.startswith(f"d: {method(config)}, 2 workers; ")
    assert traffic in line
    assert line.endswith("of memory beside the model")
