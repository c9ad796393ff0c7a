"""A run that goes on from its checkpoint is the run without a stop."""

import pytest
import torch

from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.errors import CheckpointError
from support.checkpoints import one, train
from support.problems import GOSSIP, PROBLEMS, STREAMED
from support.trainings.pytorch import advance, build, same

ALL = {**PROBLEMS, **GOSSIP, **STREAMED}
FEW = [
    "slowmo over Nesterov SGD, reset",
    "slowmo over Adam",
    "two groups, restarting rates",
    "osgp, star, slowmo, Adam",
    "streaming",
]


def resumes_everywhere(problem, folder, steps=9):
    """Saves before every step, and continues from some of these with new objects; the same to the bit."""

    def lasting(history):  # "push" and "sent" mean nothing while nothing is in flight
        return [{key: x for key, x in each.items() if key not in ("push", "sent")} for each in history]

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        whole = []
        for k in range(steps):
            optimizer.save(folder / f"{k}")
            whole += advance(problem, model, optimizer, comm.rank, range(k, k + 1))
        for k in (0, 2, 4, 5, 8):
            model, optimizer = build(problem, comm, comm.rank)
            optimizer.load(folder / f"{k}")
            optimizer.save(folder / f"{k}.again")
            again = advance(problem, model, optimizer, comm.rank, range(k, steps))
            assert same(lasting(again), lasting(whole[k:]))

    ThreadWorld(2).run(work)
    for k in (0, 2, 4, 5, 8):
        assert (folder / f"{k}").read_bytes() == (folder / f"{k}.again").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_a_resume_is_the_run_without_a_stop_to_the_bit(name, tmp_path):
    resumes_everywhere(ALL[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ALL) - set(FEW)))
@pytest.mark.sample(every=5)
def test_every_problem_resumes_to_the_bit(name, tmp_path):
    resumes_everywhere(ALL[name], tmp_path)


def test_batch_norm_and_what_only_pytorch_has_come_back(checkpoint):
    model, optimizer = one()
    optimizer.load(checkpoint)
    other, _ = reference = one()
    train(*reference, 4)
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert model[1].num_batches_tracked == 4


def head(groups):
    return lambda model: [{"params": model[0].parameters(), "lr": groups[0]}, {"params": model[1:].parameters()}]


def test_groups_are_as_they_were_or_become_one_where_they_were_alike(tmp_path):
    for rates, fits in (((0.1,), True), ((0.2,), False)):
        model, optimizer = one(groups=head(rates))
        train(model, optimizer, 2)
        optimizer.save(tmp_path / "two")
        if fits:
            model, optimizer = one()
            optimizer.load(tmp_path / "two")
            assert optimizer.steps == 2
        else:
            _, optimizer = one()
            with pytest.raises(CheckpointError, match="in different parameter groups"):
                optimizer.load(tmp_path / "two")
            _, optimizer = one(groups=head((0.3,)))
            optimizer.load(tmp_path / "two")
            assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]


def test_other_optimizers_resume_in_pytorch(tmp_path):
    for make in (torch.optim.RMSprop, torch.optim.Adagrad):
        model, optimizer = one(base=lambda p, make=make: make(p, lr=0.1))
        train(model, optimizer, 4)
        optimizer.save(tmp_path / "other")
        train(model, optimizer, 4)
        again, optimizer = one(base=lambda p, make=make: make(p, lr=0.1))
        optimizer.load(tmp_path / "other")
        train(again, optimizer, 4)
        assert same(dict(model.state_dict()), dict(again.state_dict())), make
    _, optimizer = one(base=lambda p: torch.optim.LBFGS(p))
    optimizer.inner_optimizer.state[next(iter(optimizer.param_groups[0]["params"]))] = {"old_dirs": []}
    with pytest.raises(ValueError, match="keeps 'old_dirs' as list, and a checkpoint holds tensors only"):
        optimizer.save(tmp_path / "other")


class Unmade(torch.optim.Optimizer):
    """It can't be made anew from its defaults, and can't be stepped elsewhere."""

    def __init__(self, parameters, lr, scale):
        self.scale = scale
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("sum", torch.zeros_like(p)).add_(p.grad)
                p.data -= group["lr"] * self.scale * self.state[p]["sum"]


@pytest.mark.slow
def test_an_optimizer_that_can_not_be_made_anew_leaves_all_as_it_was(tmp_path):
    model, optimizer = one(base=lambda p: Unmade(p, 0.1, 0.5))
    optimizer.save(tmp_path / "start")
    train(model, optimizer, 4)
    optimizer.save(tmp_path / "trained")
    train(model, optimizer, 1)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match="need to make a new Unmade"):
        optimizer.load(tmp_path / "start")
    assert same(before, dict(model.state_dict()))
    assert optimizer.steps == 5
    optimizer.load(tmp_path / "trained")
    assert optimizer.steps == 4
    again, optimizer = one(base=lambda p: Unmade(p, 0.1, 0.5))
    optimizer.load(tmp_path / "start")
    optimizer.load(tmp_path / "trained")
    train(again, optimizer, 1)
    assert same(before, dict(again.state_dict()))


OPTIONS = {
    "more": ({}, {"centered": True}, "has square_avg, step of 0.weight in the checkpoint, and keeps grad_avg, square"),
    "fewer": ({"momentum": 0.5}, {}, "has momentum_buffer, square_avg, step of .*, and keeps square_avg, step here"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_other_optimizers_with_other_options_are_refused(what, tmp_path):
    first, second, message = OPTIONS[what]
    model, optimizer = one(base=lambda p: torch.optim.RMSprop(p, lr=0.1, **first))
    train(model, optimizer, 3)
    optimizer.save(tmp_path / "other")
    model, optimizer = one(base=lambda p: torch.optim.RMSprop(p, lr=0.1, **second))
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        optimizer.load(tmp_path / "other")
    assert same(before, dict(model.state_dict()))
    assert not optimizer.inner_optimizer.state


def test_an_optimizer_that_can_not_be_made_anew_is_refused_where_a_join_may_leave_its_worker_out():
    config = SlowMoConfig.ar_sgd(nonfinite="exclude")
    with pytest.raises(ValueError, match="need to make a new Unmade"):
        one(config, base=lambda p: Unmade(p, 0.1, 0.5))
