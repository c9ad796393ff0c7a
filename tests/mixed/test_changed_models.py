"""PyTorch models that change in a job of both frameworks: a trace answers as the others do."""

import numpy as np
import pytest
import torch

from hvd_slowmo.comm.threads import ThreadWorld
from support.problems import LOCAL_SGD, Problem
from support.trainings.keras import doubles
from support.trainings.mixed import KerasWorker, TorchWorker

AR_SGD = Problem({"tau": None, **LOCAL_SGD, "gradients": "all"})


def workers(change, then):
    """Return the results of a PyTorch worker, whose model changes after a step and a join, and of a Keras worker."""

    def work(comm):
        mine = (TorchWorker if comm.rank == 0 else KerasWorker)(AR_SGD, comm)
        mine.step(0, 0)
        mine.join()
        if comm.rank == 0:
            change(mine.model)
        then(mine)
        return mine.flat()

    with doubles():
        return ThreadWorld(2).run(work)


@pytest.mark.parametrize("how", ["step", "join"])
@pytest.mark.sample("join")
@pytest.mark.slow
def test_values_from_outside_do_not_leave_the_frameworks_apart(how, caplog):
    def change(model):
        with torch.no_grad():
            for p in model.parts:
                p.add_(1.0)

    first, second = workers(change, lambda mine: mine.step(1, 1) if how == "step" else mine.join())
    np.testing.assert_allclose(first, second, rtol=1e-12)
    assert caplog.text.count("outside on rank 0 (loaded weights, say). All workers take the mean") == 2


@pytest.mark.slow
def test_another_form_is_refused_by_both_frameworks():
    def change(model):
        model.parts[1].data = torch.ones(5, dtype=torch.float64)
        model.parts[1].grad = None

    def then(mine):
        with pytest.raises(ValueError, match=r"model on rank 0 .* has another form. Nothing was sent or written"):
            mine.join()

    def check(mine):
        then(mine)
        mine.flat = lambda: np.zeros(1)

    workers(change, check)
