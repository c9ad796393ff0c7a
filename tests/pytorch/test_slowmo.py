"""The PyTorch adapter as a torch optimizer, on threads."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from hvd_slowmo_torch.inner import inner_optimizer


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})


def step(model, optimizer, rank=0, k=0):
    torch.manual_seed(1000 * rank + k)
    optimizer.zero_grad()
    loss = model(torch.randn(8, 4)).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def on_threads(size, work):
    """Run work(comm) on every worker. Threads share torch's random state, so workers build before they meet."""
    return ThreadWorld(size).run(work)


def test_alone_it_needs_no_horovod_launch_and_is_an_optimizer():
    model = small()
    optimizer = SlowMo(sgd(model), model, SlowMoConfig(tau=2))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.inner_optimizer.param_groups
    assert optimizer.state is optimizer.inner_optimizer.state
    assert optimizer.defaults is optimizer.inner_optimizer.defaults
    step(model, optimizer)
    assert optimizer.steps == 1
    assert "SlowMo(SGD" in repr(optimizer)


@pytest.mark.parametrize("tau", [1, 3])
def test_on_one_worker_local_sgd_is_the_bare_optimizer_to_the_bit(tau):
    ours, theirs = small(), small()
    wrapped, bare = SlowMo(sgd(ours), ours, SlowMoConfig.local_sgd(tau)), sgd(theirs)
    for k in range(7):
        step(ours, wrapped, k=k)
        step(theirs, bare, k=k)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_everyone_starts_from_rank_0_parameters_buffers_and_base_state():
    def work(comm):
        model = small(comm.rank)
        model.register_buffer("mask", torch.tensor([True, False]) ^ bool(comm.rank))
        model.frozen = nn.Parameter(torch.full((2,), float(comm.rank)), requires_grad=False)
        base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1 + comm.rank, momentum=0.9)
        if comm.rank == 0:
            model(torch.ones(4, 4)).sum().backward()
            base.step()
        optimizer = SlowMo(base, model, SlowMoConfig(), comm=comm)
        return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"], optimizer.param_groups[0]["lr"]))

    first, *others = on_threads(3, work)
    assert first[1]
    for model, state, rate in others:
        assert all(torch.equal(a, b) for a, b in zip(model.values(), first[0].values(), strict=True))
        assert all(torch.equal(state[i]["momentum_buffer"], first[1][i]["momentum_buffer"]) for i in first[1])
        assert rate == first[2]


def test_tied_frozen_and_float64_parameters():
    def work(comm):
        model = nn.Module()
        model.a = nn.Linear(3, 3, bias=False)
        model.b = nn.Linear(3, 3, bias=False)
        model.b.weight = model.a.weight
        model.c = nn.Parameter(torch.full((5,), 1 / 3), requires_grad=False)
        model.d = nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig(tau=2), comm=comm)
        kept = model.c.clone()
        for k in range(6):
            (model.b(model.a(torch.full((1, 3), comm.rank + k + 1.0))).sum() * model.d.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model.b.weight is model.a.weight
        assert torch.equal(model.c, kept)
        assert model.d.dtype == torch.float64
        return [p.detach().clone() for p in model.parameters()]

    first, *others = on_threads(3, work)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("config", [SlowMoConfig(tau=3), SlowMoConfig.local_sgd(3)])
def test_batchnorm_statistics_are_averaged_at_the_outer_step(config):
    def work(comm):
        model = small()
        optimizer = SlowMo(sgd(model), model, config, comm=comm)
        mine = []
        for k in range(3):
            torch.manual_seed(comm.rank * 10 + k)
            model(torch.randn(8, 4) + comm.rank).sum().backward()
            if comm.rank == 1 and k == 0:
                model[1].num_batches_tracked += 5
            if k == 2:
                mine = [
                    model[1].running_mean.clone(),
                    model[1].running_var.clone(),
                    model[1].num_batches_tracked.item(),
                ]
            optimizer.step()
        return mine, [model[1].running_mean, model[1].running_var, model[1].num_batches_tracked.item()]

    results = on_threads(2, work)
    (a, after), (b, other) = results
    for i in range(2):
        torch.testing.assert_close(after[i], (a[i] + b[i]) / 2)
        assert torch.equal(after[i], other[i])
    assert (a[2], b[2]) == (3, 8)
    assert after[2] == other[2] == 6  # 5.5, rounded to even


def test_buffers_that_hold_infinities_and_constants_stay_to_the_bit():
    def work(comm):
        model = small()
        model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        model.register_buffer("table", torch.rand(100, generator=torch.Generator().manual_seed(1)))
        kept = model.table.clone()
        optimizer = SlowMo(sgd(model), model, SlowMoConfig(tau=1), comm=comm)
        for k in range(3):
            step(model, optimizer, comm.rank, k)
        assert torch.equal(model.table, kept)
        assert model.mask.tolist() == [0.0, float("-inf")]

    on_threads(3, work)


def test_averaged_parameters_show_the_mean_and_give_the_own_back():
    def work(comm):
        model = small()
        optimizer = SlowMo(sgd(model), model, SlowMoConfig(tau=4), comm=comm)
        for k in range(2):
            model(torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * comm.rank + k))).sum().backward()
            optimizer.step()
        own = copy.deepcopy(model.state_dict())
        with optimizer.averaged_parameters():
            inside = copy.deepcopy(model.state_dict())
            with pytest.raises(RuntimeError, match="within averaged_parameters"):
                optimizer.step()
        with pytest.raises(ZeroDivisionError), optimizer.averaged_parameters():
            1 / 0  # noqa: B018 - an evaluation that fails
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), own.values(), strict=True))
        return own, inside

    results = on_threads(3, work)
    for key, value in results[0][1].items():
        mean = sum(own[key].double() for own, _ in results) / 3
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)
        assert all(torch.equal(value, inside[key]) for _, inside in results)


def test_a_group_added_within_a_block():
    def work(comm):
        torch.manual_seed(3)
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        config = SlowMoConfig(tau=4)
        optimizer = SlowMo(torch.optim.SGD(model["a"].parameters(), lr=0.1), model, config, comm=comm)
        late = torch.tensor([[1.0, comm.rank]])
        for k in range(8):
            if k == 2:
                with torch.no_grad():
                    model["b"].bias += comm.rank  # rank 0's values are used
                optimizer.add_param_group({"params": model["b"].parameters(), "lr": 0.2})
            optimizer.zero_grad()
            model["b"](model["a"](late)).sum().backward()
            optimizer.step()
            if k == 3:
                gamma = optimizer.state_dict()["slowmo"]["progress"]["gamma"][0]
        return gamma, [p.detach().clone() for p in model.parameters()], len(optimizer.param_groups)

    (gamma, first, groups), (_, second, _) = on_threads(2, work)
    assert gamma == pytest.approx([0.1, 0.2])  # as if the group had existed since the block began
    assert groups == 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_averaged_with_a_parameter_that_one_rank_does_not_use():
    def work(comm):
        model = nn.ModuleDict({"used": nn.Linear(1, 1), "rare": nn.Linear(1, 1), "never": nn.Linear(1, 1)})
        optimizer = SlowMo(sgd(model, weight_decay=0.1), model, SlowMoConfig.ar_sgd(), comm=comm)
        x = torch.ones(1, 1)
        loss = model["used"](x) + (model["rare"](x) if comm.rank == 0 else 0)
        loss.sum().backward()
        never = model["never"].weight.clone()
        optimizer.step()
        assert torch.equal(model["never"].weight, never)  # no gradient on any worker: no weight decay either
        assert model["never"].weight.grad is None
        return [p.grad.item() for name in ("used", "rare") for p in model[name].parameters()]

    assert on_threads(2, work) == [[1.0, 1.0, 0.5, 0.5]] * 2


def test_gradients_averaged_in_every_call_of_a_closure():
    def work(comm):
        model = nn.Linear(1, 1, bias=False)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.5), model, SlowMoConfig.ar_sgd(), comm=comm)
        before = model.weight.item()

        def closure():
            optimizer.zero_grad()
            loss = model(torch.full((1, 1), comm.rank + 1.0)).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == pytest.approx(before * (comm.rank + 1))
        return before - model.weight.item()

    assert on_threads(2, work) == pytest.approx([0.75, 0.75])


def test_two_optimizers_of_one_model_take_names_of_their_own():
    def work(comm):
        model = nn.ModuleDict({"g": nn.Linear(2, 2), "d": nn.Linear(2, 2)})
        both = [
            SlowMo(torch.optim.SGD(model[k].parameters(), lr=0.1), model, SlowMoConfig(tau=tau), comm=comm, name=k)
            for k, tau in (("g", 2), ("d", 3))
        ]
        for k in range(6):
            model["d"](model["g"](torch.full((1, 2), comm.rank + k + 1.0))).sum().backward()
            for optimizer in both:
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    first, second = on_threads(2, work)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda m: ("sgd", m, SlowMoConfig()), TypeError, "`inner_optimizer` must be a torch.optim.Optimizer"),
        (lambda m: (sgd(m), "net", SlowMoConfig()), TypeError, "`model` must be a torch.nn.Module. Received: str"),
        (lambda m: (sgd(m), m, {"tau": 3}), TypeError, "`config` must be a SlowMoConfig. Received: dict"),
        (lambda m: (sgd(small()), m, SlowMoConfig()), ValueError, "group 0 .* is not a parameter of the model"),
        (lambda m: (sgd(m.to(torch.complex64)), m, SlowMoConfig()), TypeError, "complex64"),
        (
            lambda m: (torch.optim.LBFGS(m.parameters()), m, SlowMoConfig(inner_state="average")),
            ValueError,
            "can't work with LBFGS",
        ),
        (
            lambda m: (torch.optim.SparseAdam(m.parameters()), m, SlowMoConfig(inner_state="average")),
            ValueError,
            "can't work with SparseAdam",
        ),
    ],
)
def test_wrong_arguments(arguments, error, words):
    model = nn.Linear(2, 2)
    with pytest.raises(error, match=words):
        SlowMo(*arguments(model))


def test_a_wrapped_optimizer_is_not_wrapped_again():
    model = small()
    optimizer = SlowMo(sgd(model), model, SlowMoConfig())
    with pytest.raises(TypeError, match="is a SlowMo optimizer already"):
        SlowMo(optimizer, model, SlowMoConfig())


def saved(config=None, size=1, rank=0, steps=3, hidden=3):
    """Return the state_dict of a worker in a world of this size after some steps."""

    def work(comm):
        model = nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, 1))
        optimizer = SlowMo(sgd(model), model, config or SlowMoConfig(tau=4), comm=comm)
        for k in range(steps):
            step(model, optimizer, comm.rank, k)
        return copy.deepcopy(optimizer.state_dict())

    return on_threads(size, work)[rank]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda: sgd(small()).state_dict(), "no state_dict of SlowMo"),
        (lambda: saved(SlowMoConfig(tau=4, beta=0.7)), "saved with beta=0.7, this optimizer has beta=0.5"),
        (lambda: saved(hidden=5), r"parameter 0 of the state is '0.weight' \(5, 4\).*'0.weight' \(3, 4\)"),
        (lambda: saved(size=2), "one of 2 workers, this job has 1"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(state, words):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    optimizer = SlowMo(sgd(model), model, SlowMoConfig(tau=4))
    for k in range(2):
        step(model, optimizer, k=k)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state())
    after = optimizer.state_dict()
    assert after["slowmo"]["progress"] == before["slowmo"]["progress"]
    for i, entry in before["state"].items():
        assert torch.equal(after["state"][i]["momentum_buffer"], entry["momentum_buffer"])


@pytest.mark.parametrize(("steps", "common"), [(3, False), (4, True)])
def test_whose_file_serves_whom(steps, common, caplog):
    caplog.set_level("INFO", logger="hvd_slowmo")
    state = saved(size=2, steps=steps)

    def work(comm):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
        optimizer = SlowMo(sgd(model), model, SlowMoConfig(tau=4), comm=comm)
        optimizer.load_state_dict(state)
        return optimizer.steps

    results = ThreadWorld(2).run(work, return_exceptions=True)
    assert results[0] == steps
    if common:
        assert results[1] == steps
        assert "rank 1 continues from rank 0's common state" in caplog.text
    else:
        assert "rank 0's own, saved at step 3 in the middle of a block, and this is rank 1" in str(results[1])


OTHERS = ["Adagrad", "NAdam", "RMSprop", "Rprop", "Adadelta", "ASGD", "RAdam", "Adamax", "Adam"]


@pytest.mark.parametrize("name", OTHERS)
def test_averaged_inner_state_begins_as_the_optimizer_itself_makes_it(name):
    """Not as zeros: Rprop's step size begins at the rate, NAdam's product at 1. The bias has no gradient at first."""

    proto = nn.Linear(4, 3)

    def work(comm, inner_state):
        model = copy.deepcopy(proto)
        base = getattr(torch.optim, name)(model.parameters(), lr=0.01)
        optimizer = SlowMo(base, model, SlowMoConfig(tau=4, beta=0.0, inner_state=inner_state), comm=comm)
        for k in range(7):
            optimizer.zero_grad()
            model(torch.ones(8, 4)).square().sum().backward()
            if k < 5:
                model.bias.grad = None
            optimizer.step()
        return copy.deepcopy(model.state_dict())

    (average, other), (maintain, _) = (on_threads(2, lambda comm, i=i: work(comm, i)) for i in ("average", "maintain"))
    for key, value in maintain.items():
        assert torch.equal(average[key], value)  # with equal data a mean changes nothing
        assert torch.equal(average[key], other[key])


def test_state_that_is_not_there_yet_takes_no_memory(monkeypatch):
    """Its form is known from a step of a copy, whose state is not kept."""
    seen = []

    def noting(inner):
        found = averaged(inner)
        seen.extend(weakref.ref(like) for pairs in found.values() for _, like in pairs)
        return found

    averaged = inner_optimizer.averaged
    monkeypatch.setattr(inner_optimizer, "averaged", noting)
    model = nn.Linear(4, 3)
    optimizer = SlowMo(torch.optim.Adam(model.parameters()), model, SlowMoConfig(tau=2, inner_state="average"))
    gc.collect()
    assert [ref() for ref in seen] == [None] * 6
    assert not optimizer.inner_optimizer.state


def test_an_averaged_number_of_steps_is_whole_so_that_a_file_has_it(tmp_path):
    def work(comm, loads):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        config = SlowMoConfig(tau=4, inner_state="average")
        optimizer = SlowMo(torch.optim.AdamW(model.parameters(), lr=0.01), model, config, comm=comm)
        if loads:
            optimizer.load(tmp_path / "file")
        for k in range(0 if loads else 5 if comm.rank < 2 else 0):
            model(torch.full((8, 4), k + comm.rank + 1.0)).square().sum().backward()
            optimizer.step()
        if not loads:
            optimizer.join()
            optimizer.save(tmp_path / "file")
        return [float(state["step"]) for state in optimizer.inner_optimizer.state.values()]

    saved, loaded = (ThreadWorld(3).run(lambda comm, o=o: work(comm, o)) for o in (False, True))
    assert saved == loaded == [[4, 4], [4, 4], [3, 3]]  # the mean of 4, 4 and 3 steps, and one more on two workers


@pytest.mark.parametrize("name", OTHERS[:-1])
@pytest.mark.parametrize("buffers", ["reset", "average"])
def test_buffers_of_torchs_other_optimizers(name, buffers):
    def work(comm):
        model = nn.Linear(4, 3)
        base = getattr(torch.optim, name)(model.parameters(), lr=0.01)
        initial = copy.deepcopy(base.state_dict()["state"])
        optimizer = SlowMo(base, model, SlowMoConfig(tau=2, inner_state=buffers), comm=comm)
        for k in range(4):
            generator = torch.Generator().manual_seed(10 * comm.rank + k)
            optimizer.zero_grad()
            model(torch.randn(8, 4, generator=generator)).square().sum().backward()
            optimizer.step()
        return initial, copy.deepcopy(optimizer.state_dict()["state"])

    (initial, first), (_, second) = on_threads(2, work)
    expected = initial if buffers == "reset" else second
    assert buffers == "reset" or first
    assert first.keys() == expected.keys()
    for i in expected:
        for key, value in expected[i].items():
            assert torch.equal(torch.as_tensor(first[i][key]), torch.as_tensor(value)), key
