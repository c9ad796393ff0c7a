"""BatchNorm's statistics, recomputed over the batches of all workers."""

import pytest
import torch
from torch import nn

import hvd_slowmo.torch as slowmo
from hvd_slowmo.comm.threads import ThreadWorld


def batches(rank, count):
    return [torch.tensor([[1.0 + 4 * rank + k], [3.0 + 4 * rank + k]]) for k in range(count)]


@pytest.mark.parametrize("targets", [False, True])
def test_statistics_are_the_mean_over_all_batches(targets):
    """Three batches on one worker and one on the other, around 2, 3, 4 and 6."""

    def work(comm):
        model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.5)).eval()
        model[0].running_mean.fill_(99)
        own = batches(comm.rank, [3, 1][comm.rank])
        slowmo.recompute_statistics(model, [(x, None) for x in own] if targets else own, comm=comm)
        return model[0].running_mean.item(), model[0].running_var.item(), model[0].momentum, model.training

    assert ThreadWorld(2).run(work) == [(3.75, 2.0, 0.1, False)] * 2


def test_a_worker_without_batches_gets_the_others():
    def work(comm):
        model = nn.Sequential(nn.BatchNorm1d(1))
        slowmo.recompute_statistics(model, iter(batches(0, 2 * comm.rank)), comm=comm)
        return model[0].running_mean.item()

    assert ThreadWorld(2).run(work) == [2.5, 2.5]


def test_without_any_batch_nothing_changes():
    def work(comm):
        model = nn.Sequential(nn.BatchNorm1d(1))
        model[0].running_mean.fill_(7)
        slowmo.recompute_statistics(model, [], comm=comm)
        return model[0].running_mean.item()

    assert ThreadWorld(2).run(work) == [7.0, 7.0]


def test_a_pass_that_fails_on_one_worker_is_an_error_on_all():
    def work(comm):
        model = nn.Sequential(nn.BatchNorm1d(1))
        with pytest.raises(ValueError, match=r"rank 1: expected 2D or 3D input"):
            slowmo.recompute_statistics(
                model, [*batches(0, 1), torch.ones(1)] if comm.rank else batches(0, 1), comm=comm
            )
        return model[0].running_mean.item()

    assert ThreadWorld(2).run(work) == [0.0, 0.0]


def test_other_models_are_an_error_on_every_rank():
    def work(comm):
        model = nn.Sequential(*(nn.BatchNorm1d(1) for _ in range(1 + comm.rank)))
        with pytest.raises(ValueError, match="rank 1 differs from rank 0"):
            slowmo.recompute_statistics(model, batches(0, 1), comm=comm)

    ThreadWorld(2).run(work)


def test_statistics_lag_behind_a_model_that_jumps():
    """The reason for it: the running mean is one of earlier activations."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, momentum=0.01))
    data = [torch.randn(64, 1) + 3 for _ in range(30)]
    inner = torch.optim.SGD([model[0].weight], lr=0.0)
    optimizer = slowmo.SlowMo(inner, model, tau=1)
    for x in data:
        model[0].weight.data.add_(0.2)  # a model in motion
        model(x)
        optimizer.step()
    lagging = model[1].running_mean.item()
    slowmo.recompute_statistics(model, data)
    with torch.no_grad():
        true = torch.cat([model[0](x) for x in data]).mean().item()
    assert abs(lagging - true) > 5
    assert model[1].running_mean.item() == pytest.approx(true, rel=1e-5)


def test_the_count_of_batches_is_update_bns():
    """Cumulative averages (momentum=None) go on from it."""

    def work(comm, mine):
        model = nn.Sequential(nn.BatchNorm1d(1, momentum=None))
        model[0].num_batches_tracked.fill_(1000)
        slowmo.recompute_statistics(model, mine(comm.rank), comm=comm)
        return model[0].num_batches_tracked.item()

    assert ThreadWorld(1).run(lambda comm: work(comm, lambda rank: batches(0, 4))) == [4]
    assert ThreadWorld(2).run(lambda comm: work(comm, lambda rank: batches(0, 2 + 2 * rank))) == [3, 3]
    assert ThreadWorld(2).run(lambda comm: work(comm, lambda rank: batches(0, rank))) == [1, 1]


def test_a_failed_pass_leaves_counts_momentum_and_mode():
    model = nn.Sequential(nn.BatchNorm1d(1)).eval()
    model[0].num_batches_tracked.fill_(7)
    with pytest.raises(ValueError, match="expected 2D"):
        slowmo.recompute_statistics(model, [*batches(0, 1), torch.ones(1)])
    assert model[0].num_batches_tracked.item() == 7
    assert model[0].momentum == 0.1
    assert not any(module.training for module in model.modules())


def test_layers_that_exchange_in_their_forward_pass_wait_for_nobody():
    class SyncBatchNorm(nn.BatchNorm1d):
        def forward(self, x):
            raise AssertionError("another worker may have fewer batches")

    def work(comm):
        model = nn.Sequential(SyncBatchNorm(1))
        slowmo.recompute_statistics(model, batches(comm.rank, 1 + comm.rank), comm=comm)
        with pytest.raises(AssertionError, match="fewer batches"):
            model(torch.ones(2, 1))
        return model[0].running_mean.item()

    assert ThreadWorld(2).run(work) == [5.0, 5.0]  # the mean of 2, 6 and 7
