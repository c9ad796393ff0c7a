"""Gossip with messages in flight: mass, averages, checkpoints, half precision."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.gossip import SGP
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.graphs import any_graph
from support.problems import GOSSIP, LOCAL_SGD, Problem
from support.sample import examples
from support.trainings.pytorch import advance, build, held, same


def step(problem, model, optimizer, rank, number, rate=None):
    for group in optimizer.param_groups:
        group["lr"] = problem.rate(number, 0) if rate is None else rate
    gradient = problem.gradient(rank, number, model.flat())
    model.set_gradient(gradient)
    optimizer.step()
    return gradient


def mass(model, optimizer, array, rank):
    """Return this worker's part of the numerators, messages in flight included, and the sum of all weights."""
    own = optimizer.state_dict()["slowmo"]
    progress, flight = own["progress"], own["progress"]["in_flight"]
    x = model.flat() * progress["weights"][rank]
    if flight:
        share = 1 - array[(flight - 1) % len(array), rank, rank]
        x = x + share * torch.cat(own["vectors"]["sent"]).numpy()
    return x, sum(progress["weights"]) + sum(progress["arriving"])


@examples(25)
@given(
    workers=st.integers(2, 4), period=st.integers(1, 3), seed=st.integers(0, 99), overlap=st.booleans(),
    average=st.booleans(), tau=st.sampled_from([None, 1, 3, 5]), stop=st.integers(0, 9),
    rates=st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.3]), min_size=10, max_size=10),
)  # fmt: skip
@pytest.mark.slow
def test_mass_is_conserved(workers, period, seed, overlap, average, tau, stop, rates):
    """At every step, with changing rates and across a resume, the sum changes by the inner steps alone."""
    array = any_graph(workers, period, seed)
    config = {"gossip": "sgp", "topology": array, "overlap": overlap, "tau": tau, **LOCAL_SGD}
    problem = Problem(config | ({"average": average} if tau else {}))

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        seen = [(mass(model, optimizer, array, comm.rank), 0)]
        for number, rate in enumerate(rates):
            if number == stop:
                state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                model, optimizer = build(problem, comm, comm.rank)
                model.load_state_dict(state[0])
                optimizer.load_state_dict(state[1])
            added = -rate * step(problem, model, optimizer, comm.rank, number, rate)
            seen.append((mass(model, optimizer, array, comm.rank), added))
        return seen

    told = ThreadWorld(workers).run(work)
    x = [sum(worker[k][0][0] for worker in told) for k in range(len(rates) + 1)]
    for k, (before, after) in enumerate(pairwise(x)):
        np.testing.assert_allclose(after, before + sum(worker[k + 1][1] for worker in told), rtol=0, atol=1e-12)
    for worker in told:
        np.testing.assert_allclose([weights for (_, weights), _ in worker], workers, rtol=0, atol=1e-12)


MIDWAY = ["osgp", "osgp, star, slowmo, Adam", "osgp, star, slowmo, noaverage", "sgp, star, slowmo", "dpsgd"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MIDWAY)
def test_averaged_parameters_count_what_is_in_flight_and_change_nothing(name):
    problem = GOSSIP[name]

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        means = []
        for number in range(10):
            step(problem, model, optimizer, comm.rank, number)
            before = copy.deepcopy((held(model, optimizer), optimizer.state_dict()["slowmo"]["progress"]))
            with optimizer.averaged_parameters():
                means.append(model.flat())
            assert same((held(model, optimizer), optimizer.state_dict()["slowmo"]["progress"]), before)
        return means, model.flat()

    told = ThreadWorld(3).run(work)
    expected = problem.gossip_reference(3)[1:11]
    for rank, (means, final) in enumerate(told):
        for mean, s in zip(means, expected, strict=True):
            total = s.x.sum(axis=0) + s.flying_x.sum(axis=0)
            np.testing.assert_allclose(mean, total / 3, rtol=0, atol=1e-12)
        np.testing.assert_allclose(final, expected[-1].z[rank], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["osgp", "osgp, star, slowmo, noaverage"])
def test_a_state_loaded_into_an_optimizer_in_use_recalls_its_messages(name):
    """Going back to step 3 from any later step repeats the trajectory, bitwise identical."""
    problem = GOSSIP[name]

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        advance(problem, model, optimizer, comm.rank, range(3))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        whole = advance(problem, model, optimizer, comm.rank, range(3, 9))
        for last in range(4, 9):
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(copy.deepcopy(saved[1]))  # PyTorch's optimizers train on the state they are given
            again = advance(problem, model, optimizer, comm.rank, range(3, last))
            assert same(again, whole[: last - 3])

    ThreadWorld(3).run(work)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOSSIP)
@pytest.mark.sample(every=3)
def test_resume_at_every_step_to_the_bit(name):
    problem = GOSSIP[name]
    steps = 12

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        whole, states = [], []
        for number in range(steps):
            states.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
            whole += advance(problem, model, optimizer, comm.rank, range(number, number + 1))
        for number, state in enumerate(states):
            model, optimizer = build(problem, comm, comm.rank)
            model.load_state_dict(state[0])
            optimizer.load_state_dict(copy.deepcopy(state[1]))
            until = min(number + 3, steps)
            assert same(advance(problem, model, optimizer, comm.rank, range(number, until)), whole[number:until])

    ThreadWorld(3).run(work)


@pytest.mark.parametrize(("average", "common"), [(True, True), (False, False)])
def test_a_joins_state_is_common_with_the_average_only(average, common):
    """Without the average each worker keeps a separate v and anchor."""
    problem = Problem({"gossip": "sgp", "topology": "star", "tau": 2, "average": average})

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        assert optimizer.state_dict()["slowmo"]["common"]
        advance(problem, model, optimizer, comm.rank, range(3))
        assert not optimizer.state_dict()["slowmo"]["common"]
        optimizer.join()
        return held(model, optimizer), optimizer.state_dict()["slowmo"]["common"]

    (first, a), (second, b) = ThreadWorld(2).run(work)
    assert (a, b) == (common, common)
    assert same(first["v"], second["v"]) is common
    assert same(first["x"], second["x"])


def test_parameters_are_added_between_flights_only():
    def work(comm):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        base = torch.optim.SGD(model[0].parameters(), lr=0.1)
        optimizer = SlowMo(base, model, SlowMoConfig.osgp(tau=3), comm=comm)
        for number in range(8):
            x = torch.full((1, 2), 1.0 + comm.rank + number)
            optimizer.zero_grad()
            model(x).sum().backward()
            optimizer.step()
            if number == 1:
                with pytest.raises(ValueError, match="while messages are on their way"):
                    optimizer.add_param_group({"params": list(model[1].parameters())})
            if number == 2:
                optimizer.add_param_group({"params": list(model[1].parameters())})
        optimizer.join()
        return [p.detach().clone() for p in model.parameters()]

    first, second = ThreadWorld(2).run(work)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_follows_full_precision(dtype, tolerance, overlap):
    config = SlowMoConfig(gossip=SGP(topology="star", overlap=overlap), tau=6)

    def work(comm):
        found = []
        for kind in (dtype, torch.float64):
            model = nn.Linear(40, 1, bias=False).to(kind)
            with torch.no_grad():
                model.weight.copy_(torch.linspace(-1, 1, 40)[None])
            optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, config, comm=comm)
            for k in range(27):
                noise = torch.randn(1, 40, generator=torch.Generator().manual_seed(100 * comm.rank + k))
                model.weight.grad = (model.weight.detach().double() + noise).to(kind)
                optimizer.step()
            assert model.weight.dtype == kind
            found.append(model.weight.detach().double())
        return float((found[0] - found[1]).abs().max())

    assert max(ThreadWorld(3).run(work)) < tolerance
