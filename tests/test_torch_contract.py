"""The contract of torch.optim in every corner: each class, scheduler, hook and kind of parameter that torch has."""

import copy
import inspect
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

from hvd_slowmo.comm import SoloComm, ThreadWorld
from hvd_slowmo.config import BUFFERS
from hvd_slowmo.torch import SlowMo, SlowMoConfig

BARE = SlowMoConfig.local_sgd(1)  # on one worker, the base optimizer alone


def filled(model, seed=0):
    """The model with parameters of its own random generator: torch's global one is shared by the threads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def batch(rank, k, *shape):
    return torch.randn(*(shape or (8, 4)), generator=torch.Generator().manual_seed(100 * rank + k))


def net(seed=0):
    return filled(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), seed)


def matrices(seed=0):
    return filled(nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False)), seed)


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})


def train(model, optimizer, rank, steps, first=0, schedule=None):
    for k in range(first, first + steps):
        optimizer.zero_grad()
        model(batch(rank, k)).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def held(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a, b):
    """Equal to the bit, however nested."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_all_same(results):
    for other in results[1:]:
        assert_same(results[0], other)


# Every optimizer of torch: on one worker, and on several with equal data, Local SGD is the bare optimizer to the bit.

CLASSES = {
    name: item
    for name, item in sorted(vars(torch.optim).items())
    if isinstance(item, type) and issubclass(item, torch.optim.Optimizer) and item is not torch.optim.Optimizer
}
OPTIONS = {
    "lr": torch.tensor(0.01),
    "momentum": 0.9,
    "dampening": 0.1,
    "nesterov": True,
    "weight_decay": 0.1,
    "decoupled_weight_decay": True,
    "amsgrad": True,
    "centered": True,
    "lr_decay": 0.1,
    "maximize": True,
    "foreach": True,
    "fused": True,
    "capturable": True,
    "differentiable": True,
    "line_search_fn": "strong_wolfe",
}


def cases():
    for name, kind in CLASSES.items():
        known = inspect.signature(kind).parameters
        yield name, {}
        for option, value in OPTIONS.items():
            if option in known:
                extra = {"momentum": 0.9} if option in ("nesterov", "dampening") and "momentum" in known else {}
                yield name, {option: value, **extra}


def spell(value):
    return "-".join(value) if isinstance(value, dict) else str(value)


def model_for(name):
    if name == "Muon":
        return matrices()
    if name == "SparseAdam":
        return filled(nn.Sequential(nn.Embedding(10, 4, sparse=True)))
    return net()


def input_for(name, k):
    if name == "SparseAdam":
        return torch.randint(10, (6,), generator=torch.Generator().manual_seed(k))
    return batch(0, k)


def trajectory(name, settings, wrap, model_of=model_for, input_of=input_for):
    """Parameters after each of eight steps and the base optimizer's state; or how it failed."""
    model = model_of(name)
    settings = {"lr": 0.01, **copy.deepcopy(settings)}
    history = []
    try:
        base = CLASSES[name](model.parameters(), **settings)
        optimizer = wrap(base, model)
        for k in range(8):

            def closure():
                optimizer.zero_grad()
                loss = model(input_of(name, k)).square().mean()  # noqa: B023 - called within this step only
                loss.backward()
                return loss.detach()

            history += [optimizer.step(closure), *held(model)]
    except (RuntimeError, ValueError, AssertionError, KeyError) as error:
        return type(error), str(error)
    return history, copy.deepcopy(base.state_dict())


@pytest.mark.parametrize(("name", "settings"), list(cases()), ids=spell)
def test_every_optimizer_with_every_option_is_the_bare_one_to_the_bit(name, settings):
    """Where torch refuses an option (capturable on the CPU, differentiable with leaves), SlowMo passes its error on."""
    bare = trajectory(name, settings, lambda base, model: base)
    wrapped = trajectory(name, settings, lambda base, model: SlowMo.over(SoloComm(), base, model, BARE))
    if isinstance(bare[0], type):
        assert settings.keys() & {"capturable", "differentiable"}, bare
    assert_same(wrapped, bare)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # in Adagrad
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_sparse_gradients_are_the_bare_optimizers_to_the_bit(name):
    arguments = (lambda _: model_for("SparseAdam"), lambda _, k: input_for("SparseAdam", k))
    bare = trajectory(name, {}, lambda base, model: base, *arguments)
    assert isinstance(bare[0], list)
    assert_same(trajectory(name, {}, lambda base, model: SlowMo(base, model, BARE), *arguments), bare)


@pytest.mark.parametrize("name", CLASSES)
def test_every_optimizer_on_workers_with_equal_data_is_the_bare_one_to_the_bit(monkeypatch, name):
    monkeypatch.setattr("hvd_slowmo.layout.CHUNK_BYTES", 20)
    bare = trajectory(name, {}, lambda base, model: base)

    def work(comm):
        return trajectory(name, {}, lambda base, model: SlowMo.over(comm, base, model, BARE))

    for result in ThreadWorld(2).run(work):
        assert_same(result, bare)


NO_AVERAGED_BUFFERS = ("LBFGS", "SparseAdam")  # refused: see test_wrong_arguments in test_torch.py


@pytest.mark.parametrize(
    ("name", "buffers"),
    [(n, b) for n in CLASSES for b in BUFFERS if b != "average" or n not in NO_AVERAGED_BUFFERS],
)
def test_every_optimizer_under_slow_momentum_leaves_equal_workers_and_goes_on_from_its_state(name, buffers):
    def work(comm):
        def begin():
            model = model_for(name)
            base = CLASSES[name](model.parameters(), lr=0.01)
            return model, SlowMo.over(comm, base, model, SlowMoConfig(tau=2, buffers=buffers))

        def advance(model, optimizer, steps):
            for k in steps:

                def closure():
                    optimizer.zero_grad()
                    loss = model(input_for(name, 10 * comm.rank + k)).square().mean()  # noqa: B023
                    loss.backward()
                    return loss

                optimizer.step(closure)

        model, optimizer = begin()
        advance(model, optimizer, range(3))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        advance(model, optimizer, range(3, 6))
        other, resumed = begin()
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        advance(other, resumed, range(3, 6))
        assert_same(held(other), held(model))
        assert_same(resumed.state_dict(), optimizer.state_dict())
        return held(model)

    assert_all_same(ThreadWorld(2).run(work))


def test_sparse_gradients_can_not_be_averaged_and_every_worker_says_so():
    def work(comm):
        model = model_for("SparseAdam")
        optimizer = SlowMo.over(comm, torch.optim.SGD(model.parameters(), lr=0.1), model, SlowMoConfig.ar_sgd())
        model(input_for("SparseAdam", comm.rank)).sum().backward()
        optimizer.step()

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert isinstance(result, TypeError)
        assert "has a sparse gradient" in str(result)


# Every scheduler of torch.

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 8], 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=6),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=9, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=12),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=True),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=5),
}


def test_no_scheduler_is_forgotten():
    assert {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"} <= SCHEDULERS.keys()


def scheduled(name, wrap, rate, on="wrapper", resume=None):
    """Parameters, rates and momenta of ten steps; resume: after the fifth, into "fresh" objects or the "same"."""

    def begin():
        model = net()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": copy.deepcopy(rate)}]
        base = torch.optim.SGD(groups, lr=copy.deepcopy(rate), momentum=0.9)
        optimizer = wrap(base, model)
        return model, optimizer, SCHEDULERS[name](optimizer if on == "wrapper" else base)

    model, optimizer, schedule = begin()
    history = []

    def advance(steps):
        for k in steps:
            optimizer.zero_grad()
            loss = model(batch(0, k)).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step(*([1.0 + k // 6] if name == "ReduceLROnPlateau" else []))
            settings = [(float(group["lr"]), group["momentum"]) for group in optimizer.param_groups]
            history.append((settings, held(model)))

    advance(range(5))
    if resume is not None:
        states = copy.deepcopy([part.state_dict() for part in (model, optimizer, schedule)])
        if resume == "fresh":
            model, optimizer, schedule = begin()
        else:
            advance(range(20, 23))  # somewhere else, and back
            del history[5:]
        for part, state in zip((model, optimizer, schedule), states, strict=True):
            part.load_state_dict(state)
    advance(range(5, 10))
    assert len({settings[0][0] for settings, _ in history}) > 1 or name == "MultiplicativeLR"
    return history


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_sets_the_rates_of_the_bare_optimizer_and_goes_on_after_loading(name, rate):
    def wrap(base, model):
        return SlowMo(base, model, BARE)

    bare = scheduled(name, lambda base, model: base, rate)
    assert_same(scheduled(name, wrap, rate), bare)
    assert_same(scheduled(name, wrap, rate, on="base"), bare)
    assert_same(scheduled(name, wrap, rate, resume="fresh"), bare)
    assert_same(scheduled(name, wrap, rate, resume="same"), bare)


def test_a_plateau_of_each_workers_own_loss_warns_once_and_workers_stay_equal(caplog):
    def work(comm):
        model = net()
        optimizer = SlowMo.over(comm, sgd(model), model, SlowMoConfig(tau=2))
        schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        after = []
        for k in range(8):
            train(model, optimizer, comm.rank, 1, k)
            schedule.step(-float(k) if comm.rank else 1.0)  # rank 0 sees no progress
            if k % 2:
                after.append(held(model))
        return after, optimizer.param_groups[0]["lr"]

    (first, low), (second, high) = ThreadWorld(2).run(work)
    assert low < high
    assert_same(first, second)
    said = [record.getMessage() for record in caplog.records if "learning rates differ" in record.getMessage()]
    assert len(said) == 2, said  # threads: the log of both workers; a worker says it once
    assert "rank 0: 0.0375" in said[0]
    assert "rank 1: 0.1" in said[0]


# Hooks.


def alone(config=BARE, **settings):
    model = net()
    return model, SlowMo(sgd(model, **settings), model, config)


def test_step_hooks_on_both_run_around_both_and_can_be_removed():
    model, optimizer = alone(SlowMoConfig(tau=2))
    seen = []

    def note(what):
        return lambda given, args, kwargs: seen.append((what, type(given).__name__, held(model)))

    handles = [
        optimizer.register_step_pre_hook(note("before")),
        optimizer.base.register_step_pre_hook(note("before")),
        optimizer.base.register_step_post_hook(note("after")),
        optimizer.register_step_post_hook(note("after")),
    ]
    train(model, optimizer, 0, 2)
    order = [("before", "SlowMo"), ("before", "SGD"), ("after", "SGD"), ("after", "SlowMo")]
    assert [entry[:2] for entry in seen] == order * 2
    assert_same(seen[7][2], held(model))  # the wrapper's post hook sees what the outer step has written
    for handle in handles:
        handle.remove()
    train(model, optimizer, 0, 1)
    assert len(seen) == 8


def test_a_step_pre_hook_may_change_the_arguments():
    _, optimizer = alone()
    called = []
    handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: called.append(1) or 7.0), {}))
    assert optimizer.step() == 7.0
    assert called == [1]
    handle.remove()
    assert optimizer.step() is None


def test_global_step_hooks_see_the_wrapper_and_the_base():
    model, optimizer = alone()
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append(("before", type(o).__name__))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(("after", type(o).__name__))),
    ]
    try:
        train(model, optimizer, 0, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [("before", "SlowMo"), ("before", "SGD"), ("after", "SGD"), ("after", "SlowMo")]


def test_state_dict_hooks_on_the_wrapper_and_on_the_base():
    model, optimizer = alone()
    train(model, optimizer, 0, 1)
    seen = []
    for part in (optimizer, optimizer.base):
        part.register_state_dict_pre_hook(lambda o: seen.append(("before", type(o).__name__)))
        part.register_state_dict_post_hook(lambda o, state: seen.append(("after", type(o).__name__, "slowmo" in state)))
    first = optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mine": 1}, prepend=True)
    optimizer.register_state_dict_post_hook(lambda o, state: state.update(more="mine" in state))
    state = optimizer.state_dict()
    assert seen == [("before", "SlowMo"), ("before", "SGD"), ("after", "SGD", False), ("after", "SlowMo", True)]
    assert (state["mine"], state["more"]) == (1, True)
    first.remove()
    assert "mine" not in optimizer.state_dict()


def test_load_state_dict_hooks_on_the_wrapper_and_on_the_base():
    model, optimizer = alone()
    train(model, optimizer, 0, 2)
    given = optimizer.state_dict()
    keys = set(given)
    _, fresh = alone()
    seen = []
    for part in (fresh, fresh.base):
        part.register_load_state_dict_pre_hook(lambda o, s: seen.append(("before", type(o).__name__, "slowmo" in s)))
        part.register_load_state_dict_post_hook(lambda o: seen.append(("after", type(o).__name__, fresh.steps)))
    fresh.register_load_state_dict_pre_hook(lambda o, state: state.update(rubbish=state["rubbish"] + 1))
    fresh.register_load_state_dict_pre_hook(lambda o, state: {**state, "rubbish": 1}, prepend=True)
    loaded = []
    fresh.base.register_load_state_dict_pre_hook(lambda o, state: loaded.append(state["rubbish"]))
    fresh.load_state_dict(given)
    assert set(given) == keys  # hooks have a shallow copy
    assert seen == [("before", "SlowMo", True), ("before", "SGD", False), ("after", "SGD", 0), ("after", "SlowMo", 2)]
    assert loaded == [2]
    assert_same(fresh.state_dict(), optimizer.state_dict())
    del seen[:]
    with pytest.raises(ValueError, match="no state_dict of SlowMo"):
        fresh.load_state_dict({})
    assert seen == [("before", "SlowMo", False)]  # nothing was loaded


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("config", [BARE, SlowMoConfig.ar_sgd()], ids=["local", "all"])
def test_zero_grad(config, foreach):
    model, optimizer = alone(config, foreach=foreach)
    train(model, optimizer, 0, 1)
    places = [p.grad for p in model.parameters()]
    optimizer.zero_grad(set_to_none=False)
    for p, place in zip(model.parameters(), places, strict=True):
        assert p.grad is place
        assert not p.grad.any()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_the_profiler_names_the_steps_of_both():
    model, optimizer = alone()
    with torch.autograd.profiler.profile() as profile:
        train(model, optimizer, 0, 1)
    names = {event.name for event in profile.function_events}
    assert {f"Optimizer.step#{name}.step" for name in ("SlowMo", "SGD")} <= names
    assert "Optimizer.zero_grad#SlowMo.zero_grad" in names


# Learning rates that are tensors, with workers that meet.


@pytest.mark.parametrize("config", [SlowMoConfig(tau=2), SlowMoConfig(tau=3, warmup_steps=2), SlowMoConfig.ar_sgd()])
def test_rates_that_are_tensors_and_filled_in_place_train_as_numbers_do(config):
    def work(comm, rate):
        model = net()
        base = sgd(model, lr=rate if comm.rank == 0 else 7 * rate)  # rank 0's counts
        optimizer = SlowMo.over(comm, base, model, config)
        place = optimizer.param_groups[0]["lr"]
        train(model, optimizer, comm.rank, 7, schedule=lr_scheduler.StepLR(optimizer, 2, 0.5))
        if isinstance(place, torch.Tensor):
            assert optimizer.param_groups[0]["lr"] is place
        progress = optimizer.state_dict()["slowmo"]["progress"]
        return held(model), progress["gamma"], progress["rates"], float(place)

    rate = torch.tensor(0.125)
    tensors = ThreadWorld(2).run(lambda comm: work(comm, rate.clone()))
    numbers = ThreadWorld(2).run(lambda comm: work(comm, 0.125))
    for with_tensor, with_number in zip(tensors, numbers, strict=True):
        assert_same(with_tensor[:3], with_number[:3])
    assert tensors[0][3] == tensors[1][3] == 0.125 / 8


@pytest.mark.parametrize("config", [SlowMoConfig(tau=4), SlowMoConfig.ar_sgd()], ids=["local", "all"])
def test_a_join_gives_rates_that_are_tensors_back(config):
    def work(comm):
        model = net()
        optimizer = SlowMo.over(comm, sgd(model, lr=torch.tensor(0.1)), model, config)
        place = optimizer.param_groups[0]["lr"]
        train(model, optimizer, comm.rank, 2 + 3 * comm.rank)
        optimizer.join()
        assert optimizer.param_groups[0]["lr"] is place
        return held(model), place, optimizer.steps

    assert_all_same(ThreadWorld(2).run(work))


# Groups that are added later.


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("later", ["number", "tensor"])
@pytest.mark.parametrize("config", [SlowMoConfig(tau=4), SlowMoConfig.ar_sgd()], ids=["local", "all"])
def test_a_group_added_within_a_block_under_a_scheduler(monkeypatch, config, later):
    monkeypatch.setattr("hvd_slowmo.layout.CHUNK_BYTES", 20)

    def work(comm):
        model = filled(Two(), comm.rank)
        base = torch.optim.SGD(model.a.parameters(), lr=torch.tensor(1 / 64), momentum=0.9)
        optimizer = SlowMo.over(comm, base, model, config)
        schedule = lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
        train(model, optimizer, comm.rank, 2)
        rate = 1 / 32 if later == "number" else torch.tensor(1 / 32)
        optimizer.add_param_group({"params": model.b.parameters(), "lr": rate, "momentum": 0.0})
        schedule.base_lrs.append(1 / 32)
        schedule.lr_lambdas.append(lambda k: 0.5**k)
        for k in range(2, 8):
            train(model, optimizer, comm.rank, 1, k)
            if k == 3:
                gamma = optimizer.state_dict()["slowmo"]["progress"]["gamma"]
            schedule.step()
        return held(model), gamma, float(optimizer.param_groups[1]["lr"])

    results = ThreadWorld(2).run(work)
    assert_all_same(results)
    # The new group counts for the block's first two steps as it was when it came.
    assert results[0][1] == ([1 / 64, (3 / 32 + 1 / 64) / 4] if config.tau else [0.0, 0.0])
    assert results[0][2] == 1 / 32 / 2**6


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (lambda model: {"params": model.a.parameters()}, "some parameters appear in more than one parameter group"),
        (lambda model: {"params": [nn.Parameter(torch.ones(2))]}, "is not a parameter of the model"),
        (lambda model: {"params": [nn.Parameter(torch.ones(2))], "lr": "fast"}, "is not a parameter of the model"),
        (lambda model: {"params": model.b.weight}, r"parameters, entry|entries where"),
    ],
)
def test_a_wrong_group_on_one_worker_is_refused_by_all_and_training_goes_on(group, words):
    def work(comm):
        model = filled(Two())
        optimizer = SlowMo.over(comm, torch.optim.SGD(model.a.parameters(), lr=0.1), model, SlowMoConfig(tau=2))
        with pytest.raises(ValueError, match=words):
            optimizer.add_param_group(group(model) if comm.rank else {"params": model.b.parameters()})
        assert len(optimizer.param_groups) == 1
        train(model, optimizer, comm.rank, 2)
        optimizer.add_param_group({"params": model.b.parameters()})
        train(model, optimizer, comm.rank, 2, 2)
        return held(model)

    assert_all_same(ThreadWorld(2).run(work))


# Accumulation.


def test_accumulated_gradients_are_one_step():
    def work(comm):
        model, together = matrices(), matrices()
        optimizer = SlowMo.over(comm, sgd(model), model, SlowMoConfig(tau=2))
        other = SlowMo.over(comm, sgd(together), together, SlowMoConfig(tau=2), name="together")
        for k in range(4):
            optimizer.zero_grad()
            for part in range(3):
                with optimizer.no_sync():  # changes nothing where gradients are local
                    model(batch(comm.rank, 3 * k + part)).square().mean().backward()
            optimizer.step()
            other.zero_grad()
            sum(together(batch(comm.rank, 3 * k + part)).square().mean() for part in range(3)).backward()
            other.step()
        assert optimizer.steps == other.steps == 4
        for a, b in zip(held(model), held(together), strict=True):
            torch.testing.assert_close(a, b)
        return held(model)

    assert_all_same(ThreadWorld(2).run(work))


def test_an_accumulated_gradient_that_the_last_backward_does_not_touch_is_averaged(monkeypatch):
    monkeypatch.setattr("hvd_slowmo.layout.CHUNK_BYTES", 20)

    def work(comm):
        model = filled(Two())
        optimizer = SlowMo.over(comm, sgd(model), model, SlowMoConfig.ar_sgd())
        with optimizer.no_sync():
            model(batch(comm.rank, 0)).square().mean().backward()
        model.b(batch(comm.rank, 1)).square().mean().backward()
        return [p.grad for p in model.parameters()]

    results = ThreadWorld(3).run(work)
    model = filled(Two())
    sum((model(batch(r, 0)).square().mean() + model.b(batch(r, 1)).square().mean()) / 3 for r in range(3)).backward()
    assert_all_same(results)
    for mine, p in zip(results[0], model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad)


# Types and shapes of parameters.


class Zoo(nn.Module):
    """Parameters of all floating types and layouts, and inputs of rank and step for a gradient of each."""

    def __init__(self, plain):
        super().__init__()
        values = {
            "scalar": torch.randn(()),
            "half": torch.randn(3, 2).half(),
            "empty": torch.empty(0, 3),
            "transposed": torch.randn(5, 3).t(),
            "double": torch.randn(4, 3).double().t(),
            "channels_last": torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
            "brain": torch.randn(2, 3).bfloat16().t(),
            "strided": torch.randn(4, 6)[:, ::2],
            "narrowed": torch.randn(5, 7).narrow(1, 2, 3),
        }
        for name, value in values.items():
            self.register_parameter(f"a_{name}", nn.Parameter(value.contiguous() if plain else value))

    def forward(self, rank, k):
        return sum((p.double() * batch(rank, 10 * k + i, *p.shape)).sum() for i, p in enumerate(self.parameters()))


@pytest.mark.parametrize("chunk_bytes", [8, 44])
@pytest.mark.parametrize(
    "config",
    [SlowMoConfig(tau=2), SlowMoConfig(tau=2, buffers="average", warmup_steps=1), SlowMoConfig.ar_sgd()],
    ids=["maintain", "average", "all"],
)
def test_types_and_layouts_in_one_model_train_as_contiguous_ones_do(monkeypatch, config, chunk_bytes):
    def work(comm, plain):
        model = filled(Zoo(plain), comm.rank)
        strides = [p.stride() for p in model.parameters()]
        optimizer = SlowMo.over(comm, sgd(model, weight_decay=0.1), model, config)
        for k in range(5):
            optimizer.zero_grad()
            model(comm.rank, k).backward()
            optimizer.step()
        state = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
        optimizer.join()
        assert plain or not all(p.is_contiguous() for p in model.parameters())
        assert strides == [p.stride() for p in model.parameters()]
        return held(model), state

    plain = ThreadWorld(3).run(lambda comm: work(comm, True))
    monkeypatch.setattr("hvd_slowmo.layout.CHUNK_BYTES", chunk_bytes)
    results = ThreadWorld(3).run(lambda comm: work(comm, False))
    assert_all_same([parameters for parameters, _ in results])
    for (parameters, state), (expected, expected_state) in zip(results, plain, strict=True):
        for a, b in zip(parameters + state, expected + expected_state, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


def test_workers_of_different_memory_formats_agree():
    def work(comm):
        model = filled(Zoo(plain=comm.rank == 0), comm.rank)
        optimizer = SlowMo.over(comm, sgd(model), model, SlowMoConfig(tau=2))
        for k in range(2):
            optimizer.zero_grad()
            model(comm.rank, k).backward()
            optimizer.step()
        return held(model)

    assert_all_same(ThreadWorld(2).run(work))


def holding(value):
    model = nn.Module()
    model.weight = nn.Linear(2, 2).weight
    model.odd = nn.Parameter(value)
    return model


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda: holding(torch.zeros(2, device="meta")), ValueError, "odd is on the meta device"),
        (lambda: holding(torch.zeros(1).expand(3)), RuntimeError, "single memory location"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), RuntimeError, "uninitialized parameter"),
        (lambda: nn.ParameterList([nn.Parameter(torch.empty(0))]), ValueError, "has no parameter with an element"),
    ],
    ids=["meta", "expanded", "lazy", "empty"],
)
def test_parameters_that_can_not_be_trained_are_refused_at_construction_by_all(model, error, words):
    def work(comm):
        mine = model()
        SlowMo.over(comm, torch.optim.SGD(mine.parameters(), lr=0.1), mine, SlowMoConfig(tau=2))

    for result in ThreadWorld(2).run(work, return_exceptions=True):
        assert isinstance(result, error)
        assert words in str(result)


# Models: compiled, wrapped, copied, in parts, frozen.


def test_a_compiled_model_trains_and_its_optimizer_may_have_either_module():
    def train_compiled(over):
        model = matrices()
        compiled = torch.compile(model, backend="eager")
        optimizer = SlowMo(sgd(model), compiled if over == "compiled" else model, SlowMoConfig(tau=2))
        train(compiled, optimizer, 0, 4)
        return held(model), optimizer.state_dict()

    plain = matrices()
    optimizer = SlowMo(sgd(plain), plain, SlowMoConfig(tau=2))
    train(plain, optimizer, 0, 4)
    (first, state), (second, other) = train_compiled("compiled"), train_compiled("model")
    assert_same(first, held(plain))
    assert_same(second, held(plain))
    assert [entry[0] for entry in state["slowmo"]["parameters"]] == ["_orig_mod.0.weight", "_orig_mod.2.weight"]
    optimizer.load_state_dict(other)
    with pytest.raises(ValueError, match=r"is '_orig_mod.0.weight' .* in this model it is '0.weight'"):
        optimizer.load_state_dict(state)


def test_gradients_of_a_compiled_model_are_averaged():
    models = [matrices() for _ in range(2)]
    compiled = [torch.compile(model, backend="eager") for model in models]
    for model in compiled:
        model(batch(0, 0))  # compiled here: workers as threads would compile at the same time

    def work(comm):
        optimizer = SlowMo.over(comm, sgd(models[comm.rank]), compiled[comm.rank], SlowMoConfig.ar_sgd())
        train(compiled[comm.rank], optimizer, comm.rank, 3)
        return held(models[comm.rank])

    assert_all_same(ThreadWorld(2).run(work))


class Wrapped(nn.Module):
    """As DistributedDataParallel does it: the model as a submodule of another name."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


@pytest.mark.parametrize("wrappers", [(), (0,), (1,), (0, 1)], ids=str)
def test_a_wrapper_that_renames_parameters_is_on_all_workers_or_none(wrappers):
    def work(comm):
        model = Wrapped(net()) if comm.rank in wrappers else net()
        optimizer = SlowMo.over(comm, sgd(model), model, SlowMoConfig(tau=2))
        train(model, optimizer, comm.rank, 2)
        return held(model)

    results = ThreadWorld(2).run(work, return_exceptions=True)
    if len(wrappers) == 1:
        for result in results:
            assert isinstance(result, ValueError)
            assert "rank 1 differs from rank 0: parameters, entry 0: it has " in str(result)
            assert "module.0.weight" in str(result)
    else:
        assert_all_same(results)


@pytest.mark.parametrize("config", [SlowMoConfig(tau=2), SlowMoConfig.ar_sgd()], ids=["local", "all"])
def test_an_optimizer_of_a_submodule_trains_that_and_averages_the_models_statistics(config):
    def work(comm):
        model = filled(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), comm.rank)
        optimizer = SlowMo.over(comm, sgd(model[2]), model, config)
        start, last = held(model[0]), model[2].weight.detach().clone()
        for k in range(4):
            model.zero_grad()
            model(batch(comm.rank, k)).square().mean().backward()
            foreign = model[0].weight.grad.clone()
            optimizer.step()
            assert torch.equal(foreign, model[0].weight.grad)
        assert_same(held(model[0]), start)
        assert not torch.equal(model[2].weight, last)
        return held(model), foreign, model[1].running_mean.clone()

    (first, a, mean), (second, b, other) = ThreadWorld(2).run(work)
    assert_same(first, second)  # the rest is equal too: all start as rank 0
    assert not torch.equal(a, b)
    assert torch.equal(mean, other) == (config.tau is not None)


def gan(comm, config, foreign):
    """Two models, two optimizers; the generator's backward goes through the discriminator."""
    g, d = filled(nn.Linear(2, 4), 1), filled(nn.Linear(4, 1), 2)
    of_g = SlowMo.over(comm, torch.optim.Adam(g.parameters(), lr=0.01), g, config, name="g")
    of_d = SlowMo.over(comm, torch.optim.Adam(d.parameters(), lr=0.01), d, config, name="d")
    for k in range(4):
        noise = batch(comm.rank, k, 6, 2)
        of_d.zero_grad()
        (d(g(noise).detach()).sigmoid() - d(batch(comm.rank, k, 6, 4)).sigmoid()).mean().backward()
        of_d.step()
        of_g.zero_grad()
        with foreign(of_d):
            (-d(g(noise)).sigmoid().mean()).backward()
        of_g.step()
    return held(g), held(d)


@pytest.mark.parametrize("config", [SlowMoConfig.ar_sgd(), SlowMoConfig(tau=2, warmup_steps=2)], ids=["all", "warm-up"])
def test_a_gan_of_two_models_puts_the_foreign_backward_under_no_sync(config):
    results = ThreadWorld(2).run(lambda comm: gan(comm, config, SlowMo.no_sync))
    assert_all_same(results)


def test_a_gan_without_no_sync_is_told_about_it():
    for result in ThreadWorld(2).run(
        lambda comm: gan(comm, SlowMoConfig.ar_sgd(), lambda _: nullcontext()), return_exceptions=True
    ):
        assert "those meant for another optimizer, under optimizer.no_sync()" in str(result)


def test_one_backward_averages_the_gradients_of_two_optimizers_over_parts_of_one_model(monkeypatch):
    monkeypatch.setattr("hvd_slowmo.layout.CHUNK_BYTES", 20)

    def work(comm):
        model = filled(Two())
        both = [SlowMo.over(comm, sgd(model.get_submodule(n)), model, SlowMoConfig.ar_sgd(), name=n) for n in "ab"]
        for k in range(3):
            model.zero_grad()
            model(batch(comm.rank, k)).square().mean().backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            for optimizer in both:
                optimizer.step()
        return held(model), gradients

    assert_all_same(ThreadWorld(2).run(work))


@pytest.mark.parametrize("frozen", ["some", "all"])
@pytest.mark.parametrize("chunk_bytes", [20, 2**20])
def test_gradients_of_parameters_unfrozen_later_are_averaged_when_backward_returns(monkeypatch, frozen, chunk_bytes):
    monkeypatch.setattr("hvd_slowmo.layout.CHUNK_BYTES", chunk_bytes)

    def work(comm):
        model = filled(Two())
        model.a.requires_grad_(False)
        if frozen == "all":
            model.b.requires_grad_(False)
        optimizer = SlowMo.over(comm, sgd(model), model, SlowMoConfig.ar_sgd())
        start = held(model)
        if frozen == "some":
            train(model, optimizer, comm.rank, 2)
        assert_same(held(model.a), start[:2])
        assert not any(p.requires_grad for p in model.a.parameters())
        model.requires_grad_(True)
        model.b.requires_grad_(False)  # so that nothing that was trained before takes part
        optimizer.zero_grad()
        model(batch(comm.rank, 5)).square().mean().backward()
        gradients = [p.grad.clone() for p in model.a.parameters()]
        optimizer.step()
        assert_same(gradients, [p.grad for p in model.a.parameters()])
        model.b.requires_grad_(True)
        train(model, optimizer, comm.rank, 2, 6)
        assert not torch.equal(model.a.weight, start[0])
        return gradients, held(model)

    assert_all_same(ThreadWorld(2).run(work))


def test_a_model_may_be_copied_and_pickled_and_the_copy_is_on_its_own():
    def work(comm):
        model = net()
        optimizer = SlowMo.over(comm, sgd(model), model, SlowMoConfig.ar_sgd())
        train(model, optimizer, comm.rank, 1)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), swa_utils.AveragedModel(model).module]
        if comm.rank == 0:  # no exchange: the other worker is not here
            for other in copies:
                assert_same(held(other), held(model))
                other(batch(0, 0)).sum().backward()
        train(model, optimizer, comm.rank, 1, 1)
        return held(model)

    assert_all_same(ThreadWorld(2).run(work))


def checkpointed(comm, reentrant, context):
    """Two steps with averaged gradients through two checkpoints; reentrant None: none."""
    model = filled(Two())
    optimizer = SlowMo.over(comm, sgd(model), model, SlowMoConfig.ar_sgd())
    for k in range(2):
        optimizer.zero_grad()
        x = batch(comm.rank, k).requires_grad_()
        for part in (model.a, model.b):
            x = part(x) if reentrant is None else checkpoint(part, x, use_reentrant=reentrant)
        with context(optimizer):
            x.square().mean().backward()
        optimizer.step()  # averages what no backward has averaged
    return held(model)


@pytest.mark.parametrize(
    ("reentrant", "context"), [(False, nullcontext), (False, SlowMo.no_sync), (True, SlowMo.no_sync)]
)
def test_averaged_gradients_of_checkpointed_models(reentrant, context):
    plain = ThreadWorld(2).run(lambda comm: checkpointed(comm, None, nullcontext))
    assert_same(ThreadWorld(2).run(lambda comm: checkpointed(comm, reentrant, context)), plain)


def test_reentrant_checkpoints_run_several_backwards_and_need_no_sync():
    for result in ThreadWorld(2).run(lambda comm: checkpointed(comm, True, nullcontext), return_exceptions=True):
        assert "a second backward in one step" in str(result)


@pytest.mark.parametrize("buffers", BUFFERS)
def test_parameters_given_with_their_names(buffers):
    def work(comm):
        model = filled(Two(), comm.rank)
        base = torch.optim.Adam(model.a.named_parameters(), lr=0.01)
        optimizer = SlowMo.over(comm, base, model, SlowMoConfig(tau=2, buffers=buffers))
        train(model, optimizer, comm.rank, 1)
        optimizer.add_param_group({"params": [(f"b.{name}", p) for name, p in model.b.named_parameters()]})
        train(model, optimizer, comm.rank, 3, 1)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert [group["param_names"] for group in optimizer.param_groups] == [
            ["weight", "bias"],
            ["b.weight", "b.bias"],
        ]
        return held(model)

    assert_all_same(ThreadWorld(2).run(work))


def test_the_set_of_classes_is_torchs():
    assert {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop"} <= CLASSES.keys()
    assert {"Rprop", "ASGD", "LBFGS", "SparseAdam"} <= CLASSES.keys()
    assert SlowMo not in CLASSES.values()
