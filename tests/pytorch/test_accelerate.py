"""Wrappers as accelerate's, around SlowMo and around the model: they train as SlowMo alone does, bitwise."""

import copy
import inspect
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import hvd_slowmo.torch as slowmo
from hvd_slowmo.comm.threads import ThreadWorld
from support.inner_optimizers import ScheduleFree
from support.models.pytorch import assert_same, batch, held, net, sgd

PARTS = 2  # batches whose gradients a step accumulates


@dataclass
class Accumulation:
    """True in the last batch of a step."""

    complete: bool = True


class AcceleratedLike(torch.optim.Optimizer):
    """An optimizer around SlowMo that does nothing while gradients are accumulated.

    As accelerate's, it loads the optimizer's own state, moved to the device, when it is made, and replaces the
    optimizer's `step` while a scaler calls it.
    """

    def __init__(self, optimizer, accumulation, scaler=None):
        self.optimizer, self.accumulation, self.scaler = optimizer, accumulation, scaler
        self.called = False
        self.takes_none = "set_to_none" in inspect.signature(optimizer.zero_grad).parameters
        optimizer.load_state_dict(moved(optimizer.state_dict()))

    @property
    def state(self):
        return self.optimizer.state

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def defaults(self):
        return self.optimizer.defaults

    def add_param_group(self, param_group):
        self.optimizer.add_param_group(param_group)

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(moved(state_dict))

    def state_dict(self):
        return self.optimizer.state_dict()

    def zero_grad(self, set_to_none=None):
        if self.accumulation.complete:
            self.optimizer.zero_grad(**({"set_to_none": True} if self.takes_none and set_to_none is None else {}))

    def train(self):
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()

    def eval(self):
        if hasattr(self.optimizer, "eval") and callable(self.optimizer.eval):
            self.optimizer.eval()

    def step(self, closure=None):
        if not self.accumulation.complete:
            return
        if self.scaler is None:
            self.optimizer.step(closure)
            return
        original, self.called = self.optimizer.step, False

        def noting(*arguments, **options):
            self.called = True
            return original(*arguments, **options)

        self.optimizer.step = noting
        self.scaler.step(self.optimizer, closure)
        self.scaler.update()
        self.optimizer.step = original


def moved(item):
    """Return the same structure with its tensors on the device, as accelerate moves a state."""
    if isinstance(item, torch.Tensor):
        return item.to("cpu")
    if isinstance(item, dict):
        return {key: moved(value) for key, value in item.items()}
    return type(item)(map(moved, item)) if isinstance(item, (list, tuple)) else item


class Wrapped(nn.Module):
    """A model in the place of another one, whose parameters it trains."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x).float()


def make(comm, wraps, inner=sgd, scales=False, **settings):
    """Return the bare model, what is called in its place, SlowMo, what is stepped in its place, and the rest."""
    model = net()
    bare = slowmo.SlowMo(inner(model), model, comm=comm, **settings)
    schedule = torch.optim.lr_scheduler.StepLR(bare, 3, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scales else None
    accumulation = Accumulation()
    optimizer = AcceleratedLike(bare, accumulation, scaler) if wraps else bare
    return model, Wrapped(model) if wraps else model, bare, optimizer, schedule, scaler, accumulation


def run(parts, rank, steps, first=0):
    _, called, bare, optimizer, schedule, scaler, accumulation = parts
    wraps = optimizer is not bare
    for k in range(first, first + steps):
        optimizer.zero_grad()
        for part in range(PARTS):
            accumulation.complete = part == PARTS - 1
            with nullcontext() if accumulation.complete else bare.no_sync():
                loss = called(batch(rank, PARTS * k + part)).square().mean()
                (loss if scaler is None else scaler.scale(loss)).backward()
            if accumulation.complete and scaler is not None:
                scaler.unscale_(bare)
            if accumulation.complete:
                torch.nn.utils.clip_grad_norm_(called.parameters(), 1.0)
            if wraps:
                optimizer.step()
        if not wraps and scaler is not None:
            scaler.step(bare)
            scaler.update()
        elif not wraps:
            bare.step()
        schedule.step()


SETTINGS = {
    "local": {"tau": 2},
    "gradients of all": {"tau": 3, "gradients": "all"},
    "warm-up": {"tau": 2, "warmup_steps": 3},
    "gossip": {"tau": 4, "gossip": slowmo.SGP()},
    "scaler": {"tau": 2, "scales": True},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.. before .optimizer.step")  # the scaler's calls are not counted
@pytest.mark.parametrize("name", SETTINGS)
def test_a_wrapper_around_slowmo_trains_as_slowmo_alone(name):
    def work(comm, wraps):
        parts = make(comm, wraps, **SETTINGS[name])
        bare = parts[2]
        results = []
        for epoch in range(2):
            run(parts, comm.rank, 5 + comm.rank, first=10 * epoch)
            joined = bare.join(**({"scaler": parts[5]} if parts[5] is not None else {}))
            results.append((joined, bare.steps, held(parts[0])))
        return results, bare.state_dict()

    found, expected = (ThreadWorld(2).run(lambda comm, w=wraps: work(comm, w)) for wraps in (True, False))
    assert found[0][0][-1][1] == 12
    assert_same(found, expected)


def test_a_state_through_the_wrapper_resumes_bitwise():
    def work(comm):
        parts = make(comm, True, tau=3)
        run(parts, comm.rank, 4)
        states = copy.deepcopy([parts[number].state_dict() for number in (0, 3, 4)])
        run(parts, comm.rank, 4, first=4)

        other = make(comm, True, tau=3, name="other")
        other[0].load_state_dict(states[0])
        other[3].load_state_dict(states[1])
        other[4].load_state_dict(states[2])
        run(other, comm.rank, 4, first=4)
        assert_same(held(other[0]), held(parts[0]))

    ThreadWorld(2).run(work)


def test_the_wrapper_switches_the_modes_of_a_schedule_free_optimizer_and_of_no_other():
    def work(comm):
        *_, optimizer, _, _, _ = make(comm, True, lambda model: ScheduleFree(model.parameters()), tau=2)
        optimizer.train()
        assert optimizer.param_groups[0]["train_mode"]
        optimizer.eval()
        assert not optimizer.param_groups[0]["train_mode"]
        *_, other, _, _, _ = make(comm, True, tau=2, name="other")
        other.train()
        other.eval()

    ThreadWorld(2).run(work)


def test_join_says_what_to_give_in_the_place_of_a_wrapper():
    def work(comm):
        parts = make(comm, True, tau=2)
        run(parts, comm.rank, 3)
        words = r"Received: AcceleratedLike, which wraps one\. Give that one: join\(optimizer\.optimizer\)\."
        with pytest.raises(TypeError, match=words):
            slowmo.join(parts[3])
        with pytest.raises(TypeError, match=r"Received: SGD$"):
            slowmo.join(parts[2].inner_optimizer)
        slowmo.join(parts[3].optimizer)
        return held(parts[0])

    first, second = ThreadWorld(2).run(work)
    assert_same(first, second)
