"""Outer state that is divided among the workers, on PyTorch: bitwise the undivided one, few bits, resumes, refusals."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from reference.few_bits import sharded_step
from support import few_bits
from support.problems import PROBLEMS, STREAMED, distance
from support.trainings.pytorch import resumed, run, same

MOMENTUM = {name: p for name, p in {**PROBLEMS, **STREAMED}.items() if "anchor" in SlowMoConfig(**p.config).vectors}
SHARDED = {name: replace(p, config={**p.config, "shard": True}) for name, p in MOMENTUM.items()}
LATE = [{}, {"delay": 1}, {"fragments": 4, "delay": 2}, {"fragments": 4, "delay": 4}]
FORMS = [{"bits": 32}, {"bits": 32, "alpha": 0.7, "beta": 0.0}, {"bits": 8}, {"bits": 4, "nesterov": True}]


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.slow
@pytest.mark.sample(every=2)
def test_training_is_bitwise_that_of_the_undivided_state(name):
    divided = ThreadWorld(3).run(lambda comm: run(SHARDED[name], comm))
    whole = ThreadWorld(3).run(lambda comm: run(MOMENTUM[name], comm))
    for mine, other in zip(divided, whole, strict=True):
        assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("settings", LATE, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.slow
@pytest.mark.sample(every=3)
def test_several_slices_are_bitwise_the_undivided_state(settings, size):
    """Workers with different numbers of steps, and a join."""
    expected = ThreadWorld(size).run(lambda comm: few_bits.trained({"bits": 32, **settings}, comm))
    found = ThreadWorld(size).run(lambda comm: few_bits.trained({"bits": 32, "shard": True, **settings}, comm))
    assert same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("bits", few_bits.BITS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_an_outer_step_in_few_bits_equals_the_reference_bitwise(bits, size):
    """tau = 1; alpha = 1, beta = 0.5 and a constant rate: v' = v / 2 + Delta, and the step is -v'."""

    def work(comm):
        model, optimizer = few_bits.build(comm, tau=1, beta=0.5, bits=bits, shard=True)

        def state():
            slices = few_bits.entry(optimizer)["slices"]
            own = [next(iter(slices[name].values())).numpy().copy() for name in ("v", "slice_residual")]
            return few_bits.flat(optimizer, "anchor"), few_bits.flat(optimizer, "residual"), *own

        seen = []
        for k in range(4):
            before, sent = state(), model.weight.detach().clone()
            gradient = torch.tensor(np.random.default_rng([comm.rank, k]).normal(size=few_bits.SHAPE)).float()
            model.weight.grad, model.bias.grad = gradient, torch.ones(5)
            sent.add_(gradient, alpha=-0.125)
            optimizer.step()
            assert np.array_equal(model.weight.detach().numpy().reshape(-1), state()[0])
            seen.append((before, sent.numpy().reshape(-1), state()))
        return seen

    for moment in zip(*ThreadWorld(size).run(work), strict=True):
        befores, sent, afters = zip(*moment, strict=True)
        e, v, s = ([before[n] for before in befores] for n in (1, 2, 3))
        anchor, owed, momenta, rests = sharded_step(befores[0][0], sent, e, v, s, bits, beta=0.5)
        for rank, after in enumerate(afters):
            for found, expected in zip(after, (anchor, owed[rank], momenta[rank], rests[rank]), strict=True):
                assert np.array_equal(found, expected)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("settings", LATE, ids=str)
@pytest.mark.parametrize("kind", ["state_dict", "save"])
@pytest.mark.slow
@pytest.mark.sample(every=3)
def test_a_resume_is_bitwise_the_run_without_a_stop(form, settings, kind, tmp_path):
    def work(comm):
        model, optimizer = few_bits.build(comm, shard=True, **form, **settings)
        for k in range(14):
            if k == 6:
                state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                optimizer.save(tmp_path / "x.slowmo")
            few_bits.step(model, optimizer, comm.rank, k)
        again, other = few_bits.build(comm, shard=True, **form, **settings)
        if kind == "save":
            other.load(tmp_path / "x.slowmo")
        else:
            again.load_state_dict(state[0])
            other.load_state_dict(state[1])
        for k in range(6, 14):
            few_bits.step(again, other, comm.rank, k)
        mine, theirs = few_bits.entry(optimizer), few_bits.entry(other)
        keys = ("vectors", "slices", "in_flight", "progress")
        return same(model.state_dict(), again.state_dict()) and all(same(mine[key], theirs[key]) for key in keys)

    assert ThreadWorld(3).run(work) == [True] * 3


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("size", [2, 3])
def test_another_number_of_workers_continues_from_the_whole_vectors(bits, size, tmp_path):
    def save(comm):
        model, optimizer = few_bits.build(comm, bits=bits, shard=True)
        for k in range(8):
            few_bits.step(model, optimizer, comm.rank, k)
        optimizer.join()
        optimizer.save(tmp_path / "x.slowmo")
        return momentum(optimizer, comm)

    def load(comm):
        _, optimizer = few_bits.build(comm, bits=bits, shard=True)
        optimizer.load(tmp_path / "x.slowmo")
        return momentum(optimizer, comm)

    def momentum(optimizer, comm):
        own = few_bits.entry(optimizer)["slices"]["v"][0].numpy()
        return np.concatenate(comm.gather("v", own))

    before, after = ThreadWorld(3).run(save)[0], ThreadWorld(size).run(load)[0]
    assert before.any()
    assert np.array_equal(before, after)


@pytest.mark.parametrize("stop", [3, 5])
def test_a_state_dict_is_each_ranks_own(stop):
    def work(comm):
        problem = SHARDED["slowmo over plain SGD"]
        assert resumed(problem, stop, comm)[-1]["x"].tolist() == run(problem, comm)[-1]["x"].tolist()
        model, optimizer = few_bits.build(comm, bits=32, shard=True)
        for k in range(4):
            few_bits.step(model, optimizer, comm.rank, k)
        return few_bits.entry(optimizer)["common"]

    assert ThreadWorld(2).run(work) == [False, False]


def test_a_parameter_that_is_frozen_and_returns_begins_without_momentum():
    """The slices of its anchor and its momentum follow its value, as whole vectors do."""

    def work(comm, shard):
        model, optimizer = few_bits.build(comm, bits=32, shard=shard)
        for k in range(20):
            model.weight.requires_grad_(not 5 <= k < 13)
            for p in model.parameters():
                p.grad = p.detach() - float(comm.rank + k) if p.requires_grad else None
            optimizer.step()
        return copy.deepcopy(model.state_dict())

    divided, whole = (ThreadWorld(3).run(lambda comm, s=s: work(comm, s)) for s in (True, False))
    assert same(divided, whole)


@pytest.mark.parametrize("delay", [0, 2])
def test_an_excluded_worker_takes_the_common_result(delay):
    def work(comm, shard):
        model, optimizer = few_bits.build(comm, bits=32, shard=shard, nonfinite="exclude", delay=delay)
        for k in range(12):
            few_bits.step(model, optimizer, comm.rank, k)
            if k == 5 and comm.rank == 1:
                with torch.no_grad():
                    model.weight[0, 0] = float("nan")
        return copy.deepcopy(model.state_dict())

    divided, whole = (ThreadWorld(3).run(lambda comm, s=s: work(comm, s)) for s in (True, False))
    assert same(divided, whole)
    assert torch.isfinite(divided[1]["weight"]).all()


def test_each_worker_keeps_a_part_of_the_memory():
    def work(comm, **settings):
        _, optimizer = few_bits.build(comm, **settings)
        entry = few_bits.entry(optimizer)
        slices = [x for by_chunk in entry["slices"].values() for x in by_chunk.values()]
        return sum(len(x) for x in (*slices, *(t for parts in entry["vectors"].values() for t in parts)))

    blocks, size = 4, 2
    whole = sum(p.numel() for p in few_bits.Weights().parameters())
    assert set(ThreadWorld(size).run(lambda comm: work(comm, bits=32))) == {2 * whole}
    # One more block for the bias, which travels with the rest.
    assert sum(ThreadWorld(size).run(lambda comm: work(comm, bits=32, shard=True))) == 2 * 1024 * blocks
    few = sum(ThreadWorld(size).run(lambda comm: work(comm, bits=8, shard=True)))
    assert few == size * (2 * whole + 5) + 2 * 1024 * blocks  # anchor and residual; v of the bias; slices of v and s


@pytest.mark.parametrize(
    "settings",
    [{"fragments": 2, "nonfinite": "exclude"}, {"gossip": "sgp"}],
    ids=str,
)
def test_what_cannot_work_is_refused(settings):
    from support.problems import config_of

    with pytest.raises(ValueError, match="shard=True"):
        config_of({"tau": 4, "shard": True, **settings})


def test_a_group_cannot_be_added():
    model = few_bits.Weights()
    optimizer = SlowMo(torch.optim.SGD([model.weight], lr=0.1), model, SlowMoConfig(shard=True))
    with pytest.raises(ValueError, match="shard=True"):
        optimizer.add_param_group({"params": [model.bias]})


def test_nothing_to_divide_is_said():
    with pytest.warns(UserWarning, match="nothing to divide"):
        SlowMoConfig.local_sgd(tau=4, shard=True)


@pytest.mark.workers
@pytest.mark.both_transports
@pytest.mark.parametrize("form", [{"bits": 32, "delay": 1}, {"bits": 8, "fragments": 4, "delay": 2}], ids=str)
@pytest.mark.slow
def test_real_workers_compute_what_threads_do(workers, form):
    settings = {"shard": True, **form}
    found = workers(2).run("support.few_bits:trained", settings=settings)
    expected = ThreadWorld(2).run(lambda comm: few_bits.trained(settings, comm))
    for mine, other in zip(found, expected, strict=True):
        assert np.array_equal(mine["weight"], other["weight"])


@pytest.mark.workers
@pytest.mark.both_transports
def test_workers_equal_the_reference(workers):
    for name in ("slowmo over Nesterov SGD, reset", "two groups, restarting rates", "streaming", "warm-up"):
        histories = workers(2).run("support.trainings.pytorch:run", problem=SHARDED[name])
        assert distance(histories, MOMENTUM[name]) < 1e-12
