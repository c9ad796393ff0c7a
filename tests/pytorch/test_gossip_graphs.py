"""Every topology and gossip method in the PyTorch adapter equals the dense oracle, on 1 to 16 workers and any graph."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.topology.checks import topology
from hvd_slowmo.topology.graphs import NAMED
from hvd_slowmo.torch import SlowMo
from reference.gossip import walk_gossip
from support.graphs import any_graph
from support.problems import LOCAL_SGD, SCHEDULES, Problem, config_of, distance
from support.sample import examples
from support.trainings.pytorch import build, epochs, run

TOLERANCE = 1e-12
SYMMETRIC = ("bipartite", "ring", "full")
ABOVE = {"alone": {"tau": None, **LOCAL_SGD}, "slowmo": {"tau": 3}, "noaverage": {"tau": 3, "average": False}}


def bases(workers):
    """Yield all gossip methods and topologies for a number of workers."""
    for name in NAMED:
        if name == "bipartite" and workers % 2 and workers > 1:
            continue
        yield {"gossip": "sgp", "topology": name}
        yield {"gossip": "sgp", "topology": name, "overlap": True}
        if name in SYMMETRIC:
            yield {"gossip": "dpsgd", "topology": name}


def equal_the_oracle(workers, above):
    for base in bases(workers):
        problem = Problem({**base, **ABOVE[above]}, steps=7, schedule="decay")
        histories = ThreadWorld(workers).run(lambda comm, problem=problem: run(problem, comm))
        assert distance(histories, problem) < TOLERANCE, base


@pytest.mark.slow
@pytest.mark.parametrize("above", ABOVE)
@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.sample("2-noaverage", "5-slowmo")
def test_every_topology_and_base(workers, above):
    equal_the_oracle(workers, above)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [m for m in range(1, 17) if m not in (2, 5)])
@pytest.mark.sample("1")
def test_every_topology_and_base_on_up_to_16_workers(workers):
    for above in ABOVE if workers < 9 or workers == 16 else ("slowmo",):
        equal_the_oracle(workers, above)


@st.composite
def problems(draw, workers):
    """Draw any settings with gossip."""
    method = draw(st.sampled_from(["sgp", "sgp", "dpsgd"]))
    tau = draw(st.sampled_from([None, 1, 2, 3, 5]))
    config = {"gossip": method, "tau": tau, "warmup_steps": draw(st.integers(0, 4))}
    config["topology"] = any_graph(workers, draw(st.integers(1, 3)), draw(st.integers(0, 99)), method == "dpsgd")
    if method == "sgp":
        config["overlap"] = draw(st.booleans())
    buffers = ["maintain"]
    if tau is None:
        config |= LOCAL_SGD
    else:
        config["average"] = draw(st.booleans())
        config["alpha"] = draw(st.sampled_from([0.7, 1.0, 1.2]))
        config["beta"] = draw(st.sampled_from([0.0, 0.3, 0.6]))
        if config["beta"]:
            config |= {"nesterov": draw(st.booleans()), "scale_by_lr": draw(st.booleans())}
        buffers += ["reset"] if not config["average"] else ["reset", "average"]
    config["inner_state"] = draw(st.sampled_from(buffers))
    options = draw(st.sampled_from([{}, {"momentum": 0.8}, {"momentum": 0.9, "nesterov": True}]))
    groups = draw(st.sampled_from([(0, 0, 0, 0), (0, 0, 1, 1)]))
    return Problem(config, options=options, schedule=draw(st.sampled_from(sorted(SCHEDULES))), groups=groups)


@pytest.mark.slow
@examples(25)
@given(data=st.data(), workers=st.integers(1, 4), chunk_bytes=st.sampled_from([None, 8, 24, 40, 96]))
def test_any_settings(data, workers, chunk_bytes):
    problem = data.draw(problems(workers))
    with patch.object(SlowMo, "_chunk_bytes", chunk_bytes or SlowMo._chunk_bytes):
        histories = ThreadWorld(workers).run(lambda comm: run(problem, comm))
    assert distance(histories, problem) < TOLERANCE


@pytest.mark.slow
@examples(40)
@given(data=st.data(), workers=st.integers(2, 4))
def test_any_settings_and_uneven_data(data, workers):
    """Includes joins of workers without any data."""
    problem = data.draw(problems(workers))
    plan = data.draw(st.lists(st.tuples(*[st.integers(0, 8)] * workers), min_size=1, max_size=4))
    histories = ThreadWorld(workers).run(lambda comm: epochs(problem, plan, comm))
    before = 0
    for number, joined in enumerate(s for s in problem.gossip_reference(workers, plan) if s.joined):
        for rank, history in enumerate(histories):
            np.testing.assert_allclose(history[number]["x"], joined.z[rank], rtol=0, atol=TOLERANCE)
            assert history[number]["step"] == joined.step
            # Batches: the oracle also counts warm-up steps that a worker takes with the others' gradients.
            assert history[number]["behind"] == joined.step - before - plan[number][rank]
        before = joined.step


def lopsided(m):
    """Return a custom topology of m workers, in which the preceding worker gets a large share."""
    return 0.3 * np.eye(m) + 0.7 * np.roll(np.eye(m), -1, axis=0)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("spec", [lopsided, lopsided(3), lopsided(3).tolist(), lopsided(3)[np.newaxis]])
def test_a_topology_of_ones_own(spec, overlap):
    problem = Problem({"gossip": "sgp", "topology": spec, "overlap": overlap, "tau": 4}, steps=6)
    histories = ThreadWorld(3).run(lambda comm: run(problem, comm))
    assert distance(histories, problem) < TOLERANCE


NODES = {"2 nodes of 2": [[0, 1], [2, 3]], "3 of 2, not in order": [[0, 3], [1, 4], [2, 5]]}


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("above", ABOVE)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.slow
def test_nodes(nodes, above, overlap):
    """Gossip between nodes whose workers average their gradients, with uneven data."""
    ranks = NODES[nodes]
    config = {"gossip": "sgp", "topology": "star", "overlap": overlap, "gradients": "node", **ABOVE[above]}
    problem = Problem(config, options={"momentum": 0.8})
    plan = [(5, 3, 4, 4, 6, 2)[: 2 * len(ranks)], (2, 2, 2, 2, 2, 2)[: 2 * len(ranks)]]
    worlds = [ThreadWorld(2) for _ in ranks]

    def work(comm):
        number = next(i for i, node in enumerate(ranks) if comm.rank in node)
        model, optimizer = build(problem, comm, comm.rank, worlds[number].member(ranks[number].index(comm.rank)))
        seen, taken = [], 0
        for lengths in plan:
            for _ in range(lengths[comm.rank]):
                for group in optimizer.param_groups:
                    group["lr"] = problem.rate(optimizer.steps, 0)
                optimizer.zero_grad()
                model.set_gradient(problem.gradient(comm.rank, taken, model.flat()))
                optimizer.step()
                taken += 1
            optimizer.join()
            seen.append(model.flat())
        return seen

    histories = ThreadWorld(2 * len(ranks)).run(work)
    expected = [s for s in problem.gossip_reference(2 * len(ranks), plan, ranks) if s.joined]
    for number, joined in enumerate(expected):
        for rank, history in enumerate(histories):
            np.testing.assert_allclose(history[number], joined.z[rank], rtol=0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("base", [{}, {"overlap": True}, {"gossip": "dpsgd"}], ids=["SGP", "OSGP", "D-PSGD"])
@pytest.mark.sample("OSGP")
def test_strongly_different_workers_stay_with_the_oracle(base):
    """The experiment of reference/test_gossip_against_others.py, on noise and over two long blocks: its results for the
    oracle hold for the adapter."""
    steps, workers, d = 300, 8, 20
    centre = np.random.default_rng(0).normal(size=(workers, d))
    centre = 3 * (centre - centre.mean(axis=0))
    noise = np.random.default_rng(1).normal(size=(steps, workers, d))
    rate = (workers / 2**15) ** 0.5
    config = {"gossip": "sgp", "tau": 128, "alpha": 1.0, "beta": 0.0, **base}

    def gradient(rank, step, x):
        return 2 * x / (1 + x**2) ** 2 + centre[rank] + noise[step, rank]

    def work(comm):
        model = torch.nn.Linear(d, 1, bias=False, dtype=torch.float64)
        torch.nn.init.constant_(model.weight, 0.8)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=rate), model, config_of(config), comm=comm)
        for step in range(steps):
            z = model.weight.detach()[0].numpy()
            model.weight.grad = torch.tensor(gradient(comm.rank, step, z))[None]
            optimizer.step()
        return model.weight.detach()[0].numpy()

    given = {**config, "topology": topology(None, workers, symmetric=config["gossip"] == "dpsgd")}
    last = list(walk_gossip(np.full(d, 0.8), gradient, steps=steps, lr=rate, **given))[-1]
    np.testing.assert_allclose(ThreadWorld(workers).run(work), last.z, rtol=0, atol=1e-10)
