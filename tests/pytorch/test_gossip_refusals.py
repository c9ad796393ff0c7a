"""Mistakes with gossip raise on every worker, with the cause."""

import numpy as np
import pytest
import torch
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.core.parts.schedule import CHECK_STEPS
from hvd_slowmo.gossip import SGP
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.problems import GOSSIP, config_of, with_node
from support.trainings.pytorch import advance, build


def construct(comm, config):
    model = nn.Linear(2, 1)
    return model, SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, config, comm=comm)


def raised(workers, config_of):
    return ThreadWorld(workers).run(lambda comm: construct(comm, config_of(comm.rank)), return_exceptions=True)


@pytest.mark.parametrize(
    ("workers", "settings", "words"),
    [
        (3, {"topology": "bipartite"}, "must be even. Received: 3 workers"),
        (3, {"topology": np.full((2, 2), 0.5)}, "for 3 workers"),
        (2, {"topology": np.array([[0.5, 0.5], [0.4, 0.5]])}, "columns that sum to 1"),
        (2, {"topology": np.eye(2)}, "connected"),
        (3, {"gossip": "dpsgd", "topology": "exponential"}, "symmetric for D-PSGD"),
    ],
)
def test_a_topology_that_cant_be_used(workers, settings, words):
    for error in raised(workers, lambda rank: config_of({"gossip": "sgp", **settings})):
        assert isinstance(error, ValueError)
        assert words in str(error)


def test_a_function_that_fails_on_one_worker_is_heard_by_all():
    def config(rank):
        def graph(m):
            if rank == 1:
                raise RuntimeError("no graph today")
            return np.full((m, m), 1 / m)

        return SlowMoConfig(gossip=SGP(topology=graph))

    errors = raised(3, config)
    assert isinstance(errors[1], RuntimeError)
    assert all("no graph today" in str(error) for error in errors)


def test_functions_of_one_name_with_different_graphs():
    def config(rank):
        def graph(m):
            kept = 0.5 if rank < 2 else 0.25
            return kept * np.eye(m) + (1 - kept) * np.roll(np.eye(m), 1, axis=0)

        return SlowMoConfig(gossip=SGP(topology=graph))

    for error in raised(3, config):
        assert isinstance(error, ValueError)
        assert "rank 2 differs from rank 0: topology" in str(error)


def test_different_topologies_and_nodes():
    for error in raised(2, lambda rank: SlowMoConfig(gossip=SGP(topology=("ring", "star")[rank]))):
        assert "config: gossip: topology: it has 'star' where 'ring' is expected" in str(error)
    worlds = [ThreadWorld(1), ThreadWorld(1)]

    def one_has_nodes(comm):
        model = nn.Linear(2, 1)
        config, node = SlowMoConfig(gossip=SGP(), gradients=("local", "node")[comm.rank]), worlds[comm.rank].member(0)
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        return SlowMo(base, model, config, comm=with_node(comm, node if comm.rank else None))

    for error in ThreadWorld(2).run(one_has_nodes, return_exceptions=True):
        assert "config: gradients: it has 'node' where 'local' is expected" in str(error)


@pytest.mark.slow
@pytest.mark.parametrize("config", [SlowMoConfig.sgp(), SlowMoConfig.osgp(topology="star"), SlowMoConfig.dpsgd()])
def test_gossip_alone_looks_after_who_is_finite(config):
    def work(comm):
        model, optimizer = construct(comm, config)
        for number in range(CHECK_STEPS + 1):
            model.weight.grad = torch.ones_like(model.weight)
            model.bias.grad = torch.full_like(model.bias, np.nan if (number, comm.rank) == (CHECK_STEPS - 1, 1) else 1)
            optimizer.step()

    for error in ThreadWorld(3).run(work, return_exceptions=True):
        assert isinstance(error, ValueError)
        assert "not finite" in str(error)
        assert "rank 1" in str(error)
        assert f"after step {CHECK_STEPS}" in str(error)


def test_noaverage_looks_after_who_is_finite():
    def work(comm):
        model, optimizer = construct(comm, SlowMoConfig(gossip=SGP(), average=False, tau=4))
        for _ in range(4):
            model.weight.grad = torch.full_like(model.weight, np.inf if comm.rank == 2 else 1.0)
            optimizer.step()

    for error in ThreadWorld(3).run(work, return_exceptions=True):
        assert "not finite" in str(error)
        assert "rank 2" in str(error)


@pytest.mark.parametrize("name", ["sgp", "osgp, slowmo", "sgp, slowmo, noaverage"])
def test_after_a_worker_has_left_nothing_is_mixed(name):
    problem = GOSSIP[name]

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        advance(problem, model, optimizer, comm.rank, range(3 + comm.rank))
        left = optimizer.join(leaving=comm.rank == 2).left
        before = model.flat()
        if comm.rank != 2:
            with pytest.raises(RuntimeError, match=r"ranks \[2\] have left"):
                optimizer.step()
            assert np.array_equal(model.flat(), before)
        return left

    assert ThreadWorld(3).run(work) == [(2,)] * 3


def test_averaged_parameters_on_one_worker_only_is_an_error_everywhere():
    problem = GOSSIP["osgp"]

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        advance(problem, model, optimizer, comm.rank, range(CHECK_STEPS - 1))
        if comm.rank == 0:
            with optimizer.averaged_parameters():
                pass
        optimizer.step()

    for error in ThreadWorld(2).run(work, return_exceptions=True):
        assert isinstance(error, (ValueError, RuntimeError))
