"""The contract of torch.optim: hooks."""

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.models.pytorch import BARE, alone, assert_same, held, net, sgd, train


def test_step_hooks_on_both_run_around_both_and_can_be_removed():
    model, optimizer = alone(SlowMoConfig(tau=2))
    seen = []

    def note(what):
        return lambda given, args, kwargs: seen.append((what, type(given).__name__, held(model)))

    handles = [
        optimizer.register_step_pre_hook(note("before")),
        optimizer.inner_optimizer.register_step_pre_hook(note("before")),
        optimizer.inner_optimizer.register_step_post_hook(note("after")),
        optimizer.register_step_post_hook(note("after")),
    ]
    train(model, optimizer, 0, 2)
    order = [("before", "SlowMo"), ("before", "SGD"), ("after", "SGD"), ("after", "SlowMo")]
    assert [entry[:2] for entry in seen] == order * 2
    assert_same(seen[7][2], held(model))  # the wrapper's post hook sees the result of the outer step
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


def test_step_hooks_are_given_the_arguments_as_they_were():
    _, optimizer = alone()
    seen = []
    handle = optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append((args, kwargs)))
    optimizer.step()
    closure = list
    optimizer.step(closure=closure)
    optimizer.step(closure)
    handle.remove()
    assert seen == [((optimizer,), {}), ((optimizer,), {"closure": closure}), ((optimizer, closure), {})]


def test_hooks_run_once_around_the_step_of_a_subclass():
    class Counting(SlowMo):
        def step(self, closure=None):
            return super().step(closure)

    alone()  # one of SlowMo itself was there before
    model = net()
    optimizer = Counting(sgd(model), model, BARE)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
    train(model, optimizer, 0, 2)
    assert seen == ["before", "after"] * 2


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
    for part in (optimizer, optimizer.inner_optimizer):
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
    for part in (fresh, fresh.inner_optimizer):
        part.register_load_state_dict_pre_hook(lambda o, s: seen.append(("before", type(o).__name__, "slowmo" in s)))
        part.register_load_state_dict_post_hook(lambda o: seen.append(("after", type(o).__name__, fresh.steps)))
    fresh.register_load_state_dict_pre_hook(lambda o, state: state.update(rubbish=state["rubbish"] + 1))
    fresh.register_load_state_dict_pre_hook(lambda o, state: {**state, "rubbish": 1}, prepend=True)
    loaded = []
    fresh.inner_optimizer.register_load_state_dict_pre_hook(lambda o, state: loaded.append(state["rubbish"]))
    fresh.load_state_dict(given)
    assert set(given) == keys  # hooks get a shallow copy
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
