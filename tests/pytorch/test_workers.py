"""The PyTorch adapter on real workers of both transports: misuse, lost workers, process sets."""

import re

import pytest
import torch

from support.pool import DISTRIBUTED, Pool

pytestmark = pytest.mark.workers

LOST = re.compile(
    "HorovodInternalError: .* because rank 1 ended, was killed or has not come .*after Horovod's error|"
    "DistNetworkError: .* because rank 1 ended, was killed or has not come to this exchange.*"
    "after torch.distributed's error"
)
MISUSE = {
    "tau": "ValueError: slowmo: rank 1 differs from rank 0: config: tau: it has 4 where 3 is expected",
    "beta": "config: beta: it has 0.6 where 0.5 is expected",
    "shape": "parameters, entry 0: it has parameter weight [5, 3] float32 0 "
    "where parameter weight [4, 3] float32 0 is expected",
    "names": "parameters, entry 0: it has parameter bias [4] float32 0 "
    "where parameter weight [4, 3] float32 0 is expected",
    "order": "it has parameter b.weight [2, 2] float32 0 where parameter a.weight [2, 2] float32 0 is expected",
    "type": "it has parameter weight [4, 3] float64 0 where parameter weight [4, 3] float32 0 is expected",
    "argument": "`inner_optimizer` must be a torch.optim.Optimizer. Received: str",
    "rate": "a learning rate on rank 1 is not a finite number >= 0: the sum over the block in parameter group 0 is nan",
    "parameter": "averaged inner state are not finite (NaN or infinity) on rank 1 after step 3",
    "steps": "the workers are not at the same step: rank 0 step 3, rank 1 step 6, rank 2 step 3",
    "place": "rank 0 is at an outer step, rank 1 is in averaged_parameters()",
}


@pytest.mark.slow
@pytest.mark.both_transports
@pytest.mark.parametrize("kind", MISUSE)
def test_misuse_on_one_rank_raises_on_every_rank(workers, kind):
    for said in workers(3).run("support.jobs.pytorch:misuse", kind=kind):
        assert MISUSE[kind] in said
    first, *others = workers(3).run("support.jobs.pytorch:goes_on")
    assert all(other == first for other in others)


@pytest.mark.parametrize("op", ["Average", "Adasum"])
@pytest.mark.slow
@pytest.mark.sample("Average")
def test_horovods_optimizer_is_not_wrapped(horovod_workers, op):
    for said in horovod_workers(3).run("support.jobs.pytorch:wrapped_by_horovod", op=op):
        assert "is a hvd.DistributedOptimizer, which averages gradients" in said
        assert "Keep one of the two" in said


def test_losses_are_averaged(workers):
    assert workers(3).run("support.jobs.pytorch:averaged_loss") == [(5 / 3, 4.0, [1.0, 1.0])] * 3


def test_all_types_are_handed_out_bitwise(workers):
    for small in (0, 1024):
        first, *others = workers(3).run("support.jobs.pytorch:handed_out", small=small)
        assert first["1.weight"][0, :2].signbit().tolist() == [True, False]
        assert "exp_avg_sq" in first
        for other in others:
            assert other.keys() == first.keys()
            for key, x in first.items():
                same = other[key].reshape(-1).view(torch.uint8)
                assert torch.equal(same, x.reshape(-1).view(torch.uint8)), (small, key)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["horovod.torch", DISTRIBUTED])
@pytest.mark.sample("horovod.torch")
def test_two_process_sets_train_apart(transport):
    pool = Pool(4, transport, HOROVOD_DYNAMIC_PROCESS_SETS="1")
    a, b, c, d = pool.run("support.jobs.pytorch:halves", sets=[[0, 2], [1, 3]])
    pool.close()
    assert a == c
    assert b == d
    assert a != b


def test_averaged_parameters(workers):
    results = workers(3).run("support.jobs.pytorch:averaged")
    for own, inside, after in results:
        assert after == own
        assert inside == pytest.approx([sum(other[0][i] for other in results) / 3 for i in range(2)])


@pytest.mark.slow
def test_messages_of_full_length(workers):
    assert workers(2).run("support.jobs.pytorch:large", elements=10_000_000) == [True, True]


@pytest.mark.slow
@pytest.mark.both_transports
@pytest.mark.parametrize("how", ["ends", "dies"])
@pytest.mark.sample("horovod.torch-dies", "torch.distributed-ends")
def test_a_lost_worker_is_one_clear_error_and_nothing_more_is_sent(workers, how):
    first, lost, third = workers(3).outcomes("support.jobs.pytorch:lost_worker", how=how, fatal=True)
    assert lost is None
    for said in (first, third):
        assert LOST.search(said)
        assert float(said.rsplit("|", 1)[1]) < 20


@pytest.mark.slow
def test_a_worker_that_never_comes_is_named_with_the_tensor():
    pool = Pool(2, HOROVOD_STALL_CHECK_TIME_SECONDS="2", HOROVOD_STALL_SHUTDOWN_TIME_SECONDS="6")
    with pytest.raises(AssertionError) as caught:
        pool.run("support.jobs.pytorch:stalls")
    pool.close()
    said = str(caught.value)
    assert "slowmo.ledger" in said
    assert "slowmo.model.0" in said
