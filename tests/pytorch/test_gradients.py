"""Averaged gradients: complete when backward returns, as in DistributedDataParallel; within nodes; accumulation."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.problems import NESTEROV, Problem, distance
from support.trainings.pytorch import advance, build, held


def net(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def batch(rank, k):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * rank + k))


def worker(comm, config=None, **settings):
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, SlowMo(base, model, config or SlowMoConfig.ar_sgd(), comm=comm, **settings)


@pytest.mark.parametrize("chunk_bytes", [None, 40])
def test_gradients_are_the_mean_when_backward_returns(monkeypatch, chunk_bytes):
    if chunk_bytes:
        monkeypatch.setattr("hvd_slowmo_torch.optimizer.SlowMo._chunk_bytes", chunk_bytes)

    def work(comm):
        model, optimizer = worker(comm)
        model(batch(comm.rank, 0)).square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return gradients, norm.item()

    alone = net()
    sum(alone(batch(r, 0)).square().sum() for r in range(3)).backward()
    for gradients, norm in ThreadWorld(3).run(work):
        for mine, p in zip(gradients, alone.parameters(), strict=True):
            torch.testing.assert_close(mine, p.grad / 3)
        assert norm == pytest.approx(torch.cat([p.grad.reshape(-1) / 3 for p in alone.parameters()]).norm().item())


def test_no_sync_accumulates_and_the_last_backward_averages_the_sum():
    def work(comm):
        model, optimizer = worker(comm)
        with optimizer.no_sync():
            model(batch(comm.rank, 0)).square().sum().backward()
        local = [p.grad.clone() for p in model.parameters()]
        model(batch(comm.rank, 1)).square().sum().backward()
        optimizer.step()
        return local, [p.grad.clone() for p in model.parameters()]

    (a, mean), (b, other) = ThreadWorld(2).run(work)
    assert not torch.equal(a[0], b[0])
    assert all(torch.equal(x, y) for x, y in zip(mean, other, strict=True))
    alone = net()
    sum(alone(batch(r, k)).square().sum() for r in range(2) for k in range(2)).backward()
    for mine, p in zip(mean, alone.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad / 2)


def test_a_second_backward_in_one_step_says_no_sync():
    def work(comm):
        model, _ = worker(comm)
        model(batch(comm.rank, 0)).sum().backward()
        model(batch(comm.rank, 1)).sum().backward()

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert "under optimizer.no_sync()" in str(result)


def test_after_the_warm_up_gradients_stay_local():
    def work(comm):
        model, optimizer = worker(comm, SlowMoConfig(tau=4, warmup_steps=2))
        equal = []
        for k in range(5):
            optimizer.zero_grad()
            model(batch(comm.rank, k)).square().sum().backward()
            equal.append(model[0].weight.grad.clone())
            optimizer.step()
        return equal

    first, second = ThreadWorld(2).run(work)
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [True, True, False, False, False]


def test_lbfgs_is_refused_where_gradients_are_averaged():
    model = net()
    with pytest.raises(ValueError, match="LBFGS evaluates its closure"):
        SlowMo(torch.optim.LBFGS(model.parameters()), model, SlowMoConfig.ar_sgd())


def test_pickling_and_copying_say_what_to_do():
    model = net()
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig())
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"Copy state_dict\(\) instead"):
            attempt(optimizer)


@pytest.mark.workers
@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_scaling_and_accumulation_equal_ddp(workers, tmp_path, scaled):
    for ours, theirs, steps in workers(2).run(
        "support.jobs.pytorch:against_ddp", store=str(tmp_path / "store"), scaled=scaled
    ):
        assert steps == 6
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


NODES = {"even": [[0, 1], [2, 3]], "uneven": [[0, 1, 2], [3]]}


class NodeProblem(Problem):
    """Reference of node-wise averaged gradients: the workers of a node have one gradient, their mean."""

    def gradient(self, worker, step, x):
        node = next(ranks for ranks in self.nodes if worker in ranks)
        return np.mean([super(NodeProblem, self).gradient(i, step, x) for i in node], axis=0)


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_gradients_averaged_within_nodes_equal_the_reference(nodes, warmup):
    config = {"tau": 4, "gradients": "node", "warmup_steps": warmup, "inner_state": "reset"}
    problem = Problem(config, options=NESTEROV, schedule="decay")
    worlds = [ThreadWorld(len(ranks)) for ranks in NODES[nodes]]

    def work(comm):
        number = next(i for i, ranks in enumerate(NODES[nodes]) if comm.rank in ranks)
        node = worlds[number].member(NODES[nodes][number].index(comm.rank))
        model, optimizer = build(problem, comm, comm.rank, node)
        return [held(model, optimizer), *advance(problem, model, optimizer, comm.rank, range(problem.steps))]

    histories = ThreadWorld(4).run(work)
    expected = NodeProblem({**config, "gradients": "local"}, options=NESTEROV, schedule="decay")
    object.__setattr__(expected, "nodes", NODES[nodes])
    assert distance(histories, expected) < 1e-12
    for ranks in NODES[nodes]:
        for step in range(problem.steps + 1):
            assert all(np.array_equal(histories[r][step]["x"], histories[ranks[0]][step]["x"]) for r in ranks)


def test_a_node_joins_when_all_of_its_workers_are_done():
    """With uneven data the workers of a node continue together, nodes meet at the end of a block, and all end equal."""
    nodes = NODES["even"]
    worlds = [ThreadWorld(2), ThreadWorld(2)]
    problem = Problem({"tau": 4, "gradients": "node"}, options={"momentum": 0.9})

    def work(comm):
        node = worlds[comm.rank // 2].member(comm.rank % 2)
        model, optimizer = build(problem, comm, comm.rank, node)
        behind = []
        for lengths in [(3, 6, 11, 2), (0, 1, 0, 0), (4, 4, 4, 4)]:
            for k in range(lengths[comm.rank]):
                optimizer.zero_grad()
                model.set_gradient(problem.gradient(comm.rank, k, model.flat()))
                optimizer.step()
            behind.append(optimizer.join().behind)
        return behind, optimizer.steps, model.flat()

    results = ThreadWorld(4).run(work)
    assert nodes
    assert [behind for behind, _, _ in results] == [[8, 1, 0], [5, 0, 0], [0, 1, 0], [9, 1, 0]]
    for _, steps, x in results:
        assert steps == 16
        assert np.array_equal(x, results[0][2])


@pytest.mark.workers
def test_node_gradients_need_slowmo_init(horovod_workers):
    for said in horovod_workers(2).run("support.jobs.pytorch:node_without_init"):
        assert "Call hvd_slowmo.torch.init() in place of hvd.init()." in said


@pytest.mark.parametrize("settings", [{"tau": 4, "gradients": "all"}, {"tau": 2, "warmup_steps": 4}], ids=str)
@pytest.mark.parametrize("closed", [False, True])
def test_a_rate_that_no_step_can_be_taken_with_is_an_error_everywhere(settings, closed):
    """With a closure, which would have averaged the gradients, too."""

    def work(comm):
        model = nn.Linear(2, 1)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = SlowMo(inner, model, SlowMoConfig(**settings), comm=comm)

        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(2, 2)).sum()
            loss.backward()
            return loss

        for k in range(9):
            if k == 1 and comm.rank == 1:
                inner.param_groups[0]["lr"] = float("nan")
            if closed:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()

    for error in ThreadWorld(2).run(work, return_exceptions=True):
        assert isinstance(error, ValueError)
        assert "a learning rate on rank 1 is not a finite number" in str(error)


def test_a_gradient_that_is_expanded_takes_the_mean():
    def work(comm):
        model = nn.Linear(2, 1, bias=False)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=1.0), model, SlowMoConfig.ar_sgd(), comm=comm)
        before = model.weight.detach().clone()
        model.weight.grad = torch.full((1, 1), comm.rank + 1.0).expand(1, 2)
        optimizer.step()
        return (before - model.weight.detach()).tolist()

    assert ThreadWorld(2).run(work) == [[[1.5, 1.5]]] * 2
