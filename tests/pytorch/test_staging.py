"""Host staging without a device: the test decides when copies arrive. test_gpu.py covers CUDA."""

from collections.abc import Sequence

import pytest
import torch

from hvd_slowmo_torch.comm.host_staging import Outbox
from support.late_copies import LateCopies
from support.problems import PROBLEMS
from support.trainings.pytorch import same


def sent(looks: int, tensors: Sequence[torch.Tensor]) -> tuple[Outbox, list[str], list]:
    order: list[str] = []

    def submit(name: str, x: torch.Tensor) -> str:
        assert not x.isnan().any()
        order.append(name)
        x.mul_(2)  # the sum over two equal workers
        return f"handle of {name}"

    outbox = Outbox(submit, LateCopies(looks, torch.float32))
    return outbox, order, [outbox.put(str(number), x) for number, x in enumerate(tensors)]


def test_nothing_is_handed_over_before_it_is_in_host_memory():
    x = torch.ones(3)
    outbox, order, (begun,) = sent(2, [x])
    assert (order, begun.handle) == ([], None)
    outbox.advance()
    assert order == []
    outbox.advance()
    assert (order, begun.handle) == (["0"], "handle of 0")
    assert x.tolist() == [1, 1, 1]  # the caller's, until the result is taken
    assert outbox.take(begun) is x
    assert x.tolist() == [2, 2, 2]


def test_sums_are_handed_over_in_their_order_wherever_they_are():
    """A transport without names matches them by that order, and copies arrive when they like."""
    outbox, order, begun = sent(3, [torch.ones(1), torch.ones(2), torch.ones(1, dtype=torch.float64)])
    assert order == []
    while len(order) < 3:
        outbox.advance()
    assert order == ["0", "1", "2"]
    assert [outbox.take(each).tolist() for each in begun] == [[2], [2, 2], [2]]


def test_a_horovod_that_takes_tensors_on_the_device_gets_them():
    x = torch.ones(2)
    outbox = Outbox(lambda name, given: given, None)
    begun = outbox.put("x", x)
    assert begun.handle is x
    assert outbox.take(begun) is x


@pytest.mark.workers
@pytest.mark.parametrize("name", ["slowmo over plain SGD", "warm-up", "ar_sgd"])
@pytest.mark.slow
def test_a_staged_training_is_bitwise_the_direct_one(workers, name):
    # Two workers: with more, Horovod's fusion of neighbouring chunks can change the last bit of a sum.
    direct = workers(2).run("support.jobs.pytorch:staged", problem=PROBLEMS[name], looks=None)
    staged = workers(2).run("support.jobs.pytorch:staged", problem=PROBLEMS[name], looks=2)
    assert same(staged, direct)
