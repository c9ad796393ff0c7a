"""Corner cases of joins and averaged gradients in which workers could diverge or a mistake could go unnoticed."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig

AR = SlowMoConfig.ar_sgd()


def batch(rank, k, size=8):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(100 * rank + k))


def worker(comm, config, proto=None, lr=0.1, **settings):
    model = copy.deepcopy(proto) if proto is not None else nn.Linear(4, 2)
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return model, SlowMo(base, model, config, comm=comm, **settings)


def equal(results):
    return all(all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)) for other in results[1:])


def state(model, optimizer):
    entries = optimizer.state_dict()["state"].values()
    return [t.detach().clone() for t in [*model.state_dict().values(), *(e["momentum_buffer"] for e in entries)]]


@pytest.mark.parametrize(
    "config",
    [
        AR,
        SlowMoConfig(tau=3, gradients="all"),
        SlowMoConfig(tau=3, warmup_steps=20),
    ],
    ids=["ar_sgd", "all and tau", "within warm-up"],
)
def test_clipping_with_uneven_data_and_batchnorm_leaves_all_equal(config):
    """A worker in a join does not know of the others' clipping, so it catches up from one that trained to the end."""
    proto = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    def work(comm):
        model, optimizer = worker(comm, config, proto)
        for epoch in range(2):
            for k in range(3 + 2 * ((comm.rank + epoch) % 3)):
                optimizer.zero_grad()
                model(batch(comm.rank, k)).square().sum().backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
            optimizer.join()
        return state(model, optimizer)

    assert equal(ThreadWorld(3).run(work))


@pytest.mark.parametrize("uneven", [0, 1])
def test_the_first_block_begins_equal_whatever_the_warm_up_did(uneven):
    def work(comm):
        model, optimizer = worker(comm, SlowMoConfig(tau=3, warmup_steps=4), lr=0.1 + 0.1 * comm.rank)
        for k in range(12 - 6 * uneven * comm.rank):
            optimizer.zero_grad()
            model(batch(comm.rank, k)).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            if k == 2 and uneven and comm.rank == 1:
                optimizer.join()
                break
        else:
            optimizer.join()
        vectors = optimizer.state_dict()["slowmo"]["vectors"]
        return [*(p.detach().clone() for p in model.parameters()), *vectors["anchor"], *vectors["v"]]

    assert equal(ThreadWorld(2).run(work))


def test_a_node_that_is_done_has_equal_workers_with_clipping():

    def work(comm):
        model, optimizer = worker(comm, SlowMoConfig(tau=4, gradients="node"))
        for k in range((3, 6, 2, 9)[comm.rank]):
            optimizer.zero_grad()
            model(batch(comm.rank, k)).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        optimizer.join()
        return [p.detach().clone() for p in model.parameters()], state(model, optimizer)

    results = ThreadWorld(4, node_size=2).run(work)
    assert equal([parameters for parameters, _ in results])
    for node in (results[:2], results[2:]):  # inner state too, within a node
        assert equal([both for _, both in node])


def test_statistics_are_averaged_by_a_join_of_averaged_gradients():
    def work(comm):
        model, optimizer = worker(comm, AR, nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
        for k in range(3):
            optimizer.zero_grad()
            model(batch(comm.rank, k)).square().sum().backward()
            optimizer.step()
        own = model[1].running_mean.clone()
        optimizer.join()
        return own, model[1].running_mean

    (a, mean), (b, other) = ThreadWorld(2).run(work)
    assert not torch.equal(a, b)
    assert torch.equal(mean, other)
    torch.testing.assert_close(mean, (a + b) / 2)


def test_an_excluded_worker_is_mended_by_a_join_in_which_nobody_else_has_steps():
    def work(comm):
        model, optimizer = worker(comm, SlowMoConfig(tau=4, nonfinite="exclude"))
        for k in range(5 if comm.rank == 1 else 4):
            optimizer.zero_grad()
            model(batch(comm.rank, k)).square().sum().backward()
            optimizer.step()
        if comm.rank == 1:
            with torch.no_grad():
                model.weight[0, 0] = float("nan")
        optimizer.join()
        return [p.detach().clone() for p in model.parameters()]

    results = ThreadWorld(3).run(work)
    assert equal(results)
    assert all(bool(p.isfinite().all()) for p in results[1])


def test_averaged_parameters_of_an_excluded_worker_change_nothing_of_its_training():
    def work(comm):
        model, optimizer = worker(comm, SlowMoConfig(tau=4, nonfinite="exclude"))
        model(batch(comm.rank, 0)).square().sum().backward()
        optimizer.step()
        if comm.rank == 1:
            with torch.no_grad():
                model.weight[0, 0] = float("nan")
        with optimizer.averaged_parameters():
            assert bool(model.weight.isfinite().all())
        return len(optimizer.state_dict()["state"])

    assert ThreadWorld(2).run(work) == [2, 2]


@pytest.mark.parametrize("nonfinite", ["raise", "exclude"])
def test_batchnorm_statistics_that_are_not_finite_do_not_spread(nonfinite):
    def work(comm):
        proto = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        model, optimizer = worker(comm, SlowMoConfig(tau=2, nonfinite=nonfinite), proto)
        for k in range(2):
            optimizer.zero_grad()
            model(batch(comm.rank, k)).square().sum().backward()
            if comm.rank == 1 and k == 1:
                model[1].running_var[0] = float("inf")
            optimizer.step()
        return bool(model[1].running_var.isfinite().all())

    results = ThreadWorld(2).run(work, return_exceptions=True)
    if nonfinite == "exclude":
        assert results == [True, True]
    else:
        assert all("averaged inner state are not finite (NaN or infinity) on rank 1" in str(r) for r in results)


class Fails(torch.autograd.Function):
    """A backward that fails, as when memory runs out."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("out of memory")


def test_a_backward_that_failed_before_it_sent_anything_can_be_repeated():
    def work(comm):
        model, optimizer = worker(comm, AR, nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
        with pytest.raises(ArithmeticError):
            model[1](Fails.apply(model[0](batch(comm.rank, 0)))).square().sum().backward()
        optimizer.zero_grad()
        model(batch(comm.rank, 1)).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    assert equal(ThreadWorld(2).run(work))


def test_a_backward_that_failed_after_it_sent_gradients_is_an_error(monkeypatch):
    monkeypatch.setattr("hvd_slowmo_torch.optimizer.SlowMo._chunk_bytes", 8)

    def work(comm):
        model, optimizer = worker(comm, AR, nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
        with pytest.raises(ArithmeticError):
            model[1](Fails.apply(model[0](batch(comm.rank, 0)))).square().sum().backward()
        optimizer.zero_grad()
        model(batch(comm.rank, 1)).square().sum().backward()

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert "a backward failed after some of its gradients had been sent" in str(result)


def test_checkpointing_within_backward_says_what_to_use():
    def work(comm, reentrant):
        model, _ = worker(comm, AR, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)))
        x = model[0](batch(comm.rank, 0))
        model[2](checkpoint(model[1], x, use_reentrant=reentrant)).square().sum().backward()

    ThreadWorld(2).run(lambda comm: work(comm, False))
    for result in ThreadWorld(2).run(lambda comm: work(comm, True), return_exceptions=True):
        assert "use_reentrant=False" in str(result)


def test_under_a_scaler_one_backward_must_average():
    def work(comm):
        model, optimizer = worker(comm, AR)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        with optimizer.no_sync():
            scaler.scale(model(batch(comm.rank, 0)).square().sum()).backward()
        scaler.step(optimizer)

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert "leave one backward of every step outside of no_sync()" in str(result)


def test_a_backward_under_no_sync_after_the_averaged_one_is_an_error():
    def work(comm):
        model, optimizer = worker(comm, AR)
        model(batch(comm.rank, 0)).sum().backward()
        with optimizer.no_sync():
            model(batch(comm.rank, 1)).sum().backward()

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert "a second backward in one step" in str(result)


NEEDS_ALL = {
    "backward": lambda model, optimizer: model(batch(0, 0)).sum().backward(),
    "averaged_parameters": lambda model, optimizer: optimizer.averaged_parameters().__enter__(),
    "add_param_group": lambda model, optimizer: optimizer.add_param_group({"params": []}),
}


@pytest.mark.parametrize("how", NEEDS_ALL)
def test_who_has_left_is_missed_wherever_it_would_be_needed(how):
    def work(comm):
        model, optimizer = worker(comm, AR)
        optimizer.join(leaving=comm.rank == 1)
        if comm.rank == 0:
            with pytest.raises(RuntimeError, match=r"ranks \[1\] have left"):
                NEEDS_ALL[how](model, optimizer)

    ThreadWorld(2).run(work)


def test_a_refused_outer_step_leaves_averaged_gradients_in_order():
    def work(comm):
        model, optimizer = worker(comm, SlowMoConfig(tau=2, gradients="all"))
        for k in range(4):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 0.1
            model(batch(comm.rank, k)).square().sum().backward()
            if k == 1:
                optimizer.zero_grad(set_to_none=False)
                optimizer.param_groups[0]["lr"] = -1.0 if comm.rank else 0.1
                with pytest.raises(ValueError, match="learning rate on rank 1"):
                    optimizer.step()
                optimizer.param_groups[0]["lr"] = 0.1
            elif k > 1:
                break
            else:
                optimizer.step()
        return [p.grad.clone() for p in model.parameters()]

    assert equal(ThreadWorld(2).run(work))


@pytest.mark.slow
def test_an_optimizer_that_is_dropped_leaves_no_hooks_behind():
    model = nn.Linear(4, 2)

    def work(comm):
        mine = copy.deepcopy(model)
        for _ in range(2):
            optimizer = SlowMo(torch.optim.SGD(mine.parameters(), lr=0.1), mine, AR, comm=comm)
            for k in range(2):
                optimizer.zero_grad()
                mine(batch(comm.rank, k)).sum().backward()
                optimizer.step()
            del optimizer
            gc.collect()
        return [p.detach().clone() for p in mine.parameters()]

    assert equal(ThreadWorld(2).run(work))


def test_a_state_of_the_warm_up_loaded_later_averages_in_backward_again():
    def work(comm):
        model, optimizer = worker(comm, SlowMoConfig(tau=4, warmup_steps=2))
        early = copy.deepcopy(optimizer.state_dict())
        for k in range(3):
            optimizer.zero_grad()
            model(batch(comm.rank, k)).square().sum().backward()
            optimizer.step()
        optimizer.load_state_dict(early)
        optimizer.zero_grad()
        model(batch(comm.rank, 5)).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    assert equal(ThreadWorld(2).run(work))


def test_nothing_of_the_state_may_change_within_averaged_parameters():
    model = nn.Linear(4, 2)
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig())
    with optimizer.averaged_parameters():
        for attempt in (
            optimizer.join,
            lambda: optimizer.load_state_dict({}),
            lambda: optimizer.add_param_group({"params": []}),
            lambda: optimizer.averaged_parameters().__enter__(),
        ):
            with pytest.raises(RuntimeError, match=r"within averaged_parameters\(\)"):
                attempt()


def test_two_optimizers_in_one_backward_whose_ranks_reach_different_parts():
    """All optimizers of a backward start their collectives before any of them waits."""

    def work(comm):
        parts = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
        both = [
            SlowMo(torch.optim.SGD(part.parameters(), lr=0.1), parts, AR, comm=comm, name=f"part{i}")
            for i, part in enumerate(parts)
        ]
        x = batch(comm.rank, 0)
        (parts[0](x) + parts[1](x)).sum().backward()
        for optimizer in both:
            optimizer.step()
        return [p.detach().clone() for p in parts.parameters()]

    assert equal(ThreadWorld(2).run(work))


def test_a_group_without_a_learning_rate_is_refused_at_once():
    class NoRate(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="group 0 of the inner optimizer has no learning rate"):
        SlowMo(NoRate(model.parameters()), model, SlowMoConfig())
