"""Checkpoints that no framework owns: what is in them, what is refused, and that nothing is touched then."""

import contextlib
import errno
import functools
import os
import shutil
import stat

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from hvd_slowmo import safefile, snapshot
from hvd_slowmo.base_state import Carried, converted
from hvd_slowmo.comm import SoloComm, ThreadWorld
from hvd_slowmo.safefile import SnapshotError
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.checkpoints import RESET, damaged, loaded, saved
from support.problems import GOSSIP, LOCAL_SGD, PROBLEMS, Problem
from support.trainings.pytorch import advance, build, held, same

ALL = {**PROBLEMS, **GOSSIP}
FEW = [
    "slowmo over Nesterov SGD, reset",
    "slowmo over Adam",
    "two groups, restarting rates",
    "osgp, star, slowmo, Adam",
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


@pytest.mark.parametrize("name", FEW)
def test_a_resume_is_the_run_without_a_stop_to_the_bit(name, tmp_path):
    resumes_everywhere(ALL[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ALL) - set(FEW)))
def test_every_problem_resumes_to_the_bit(name, tmp_path):
    resumes_everywhere(ALL[name], tmp_path)


def test_hundreds_of_damaged_files_are_refused_and_nothing_is_touched(tmp_path):
    path = tmp_path / "whole" / "checkpoint"
    path.parent.mkdir()
    saved(path, 2, 3)
    names = sorted(file.name for file in path.parent.iterdir())
    assert len(names) == 3, "one for both workers, and one each"
    rng = np.random.default_rng(0)
    kinds = set()

    def work(comm):
        model, optimizer = build(RESET, comm, comm.rank)
        advance(RESET, model, optimizer, comm.rank, range(5))
        before = (held(model, optimizer), optimizer.state_dict()["state"], optimizer._progress, optimizer.param_groups)
        before = ({k: v.copy() for k, v in before[0].items()}, str(before[1:]))
        for number in range(240):
            if comm.rank == 0:
                shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
                shutil.copytree(path.parent, tmp_path / "damaged")
                kinds.add(damaged([tmp_path / "damaged" / name for name in names], rng))
            comm.gather(f"{number}", None)
            with pytest.raises(ValueError, match=r"altered|damaged|missing|belongs|alone has|is no|rank \d: "):
                optimizer.load(tmp_path / "damaged" / "checkpoint")
            comm.gather(f"{number}.tried", None)
        now = (optimizer.state_dict()["state"], optimizer._progress, optimizer.param_groups)
        assert same(before[0], held(model, optimizer))
        assert before[1] == str(now)
        optimizer.load(path)
        assert optimizer.steps == 3

    ThreadWorld(2).run(work)
    assert len(kinds) == 7


def one(config=None, groups=None, model=None, base=None):
    """A single worker's optimizer over a model with layers."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    base = base or (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5))
    optimizer = SlowMo.over(SoloComm(), base(groups(model) if groups else model.parameters()), model, config or CONFIG)
    return model, optimizer


CONFIG = SlowMoConfig(tau=3)


def train(model, optimizer, steps):
    for k in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=torch.Generator().manual_seed(k))).square().mean().backward()
        optimizer.step()


@pytest.fixture
def checkpoint(tmp_path):
    model, optimizer = one()
    train(model, optimizer, 4)
    optimizer.save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def head(groups):
    return lambda model: [{"params": model[0].parameters(), "lr": groups[0]}, {"params": model[1:].parameters()}]


OTHERS = {
    "settings": (lambda: one(SlowMoConfig(tau=4)), "saved with tau=3, this optimizer has tau=4"),
    "wider": (
        lambda: one(model=nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))),
        r"another model: its tensor 0 is 0.linear.weight \(slow, float32, shape \(4, 3\)\), here it is .*\(5, 3\)",
    ),
    "shorter": (lambda: one(model=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), "8 tensors, here there are 6"),
    "type": (
        lambda: one(model=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()),
        "here it is .*float64",
    ),
    "fewer trained": (lambda: one(groups=lambda m: m[0].parameters()), "not the same tensors are trained"),
    "own layer": (
        lambda: one(model=nn.ParameterList([nn.Parameter(torch.ones(2))])),
        "by the names of a ParameterMap, here they are by the names of torch alone: .*ParameterList is not a layer",
    ),
    "other base": (
        lambda: one(base=lambda p: torch.optim.Adam(p)),
        "those of SGD, this one is Adam or AdamW, which can't take them",
    ),
    "no momentum": (
        lambda: one(base=lambda p: torch.optim.SGD(p, lr=0.1)),
        "has momentum in the checkpoint, and keeps",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_training_is_refused(what, checkpoint):
    make, message = OTHERS[what]
    model, optimizer = make()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(SnapshotError, match=message):
        optimizer.load(checkpoint)
    assert same([p.detach() for p in model.parameters()], before)
    assert optimizer.steps == 0


def test_what_is_no_checkpoint_is_refused(checkpoint, monkeypatch):
    _, optimizer = one()
    folder = checkpoint.parent
    torch.save({"a": torch.ones(2)}, folder / "torch.pt")
    save_file({"a": np.ones(2)}, folder / "plain.safetensors")
    (folder / "empty").touch()
    for name, message in {
        "nothing": "there is no file",
        ".": "there is no file",
        "torch.pt": "is no checkpoint",
        "empty": "is no checkpoint",
        "plain.safetensors": "a safetensors file of something else",
    }.items():
        with pytest.raises(SnapshotError, match=message):
            optimizer.load(folder / name)
    with pytest.raises(SnapshotError, match="in a folder that there is"):
        optimizer.save(folder / "nowhere" / "checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(safefile, "FORMAT", 2)
        optimizer.save(folder / "newer")
    with pytest.raises(SnapshotError, match="has format 2, this version of hvd-slowmo reads format 1"):
        optimizer.load(folder / "newer")


def test_batch_norm_and_what_only_pytorch_has_come_back(checkpoint):
    model, optimizer = one()
    optimizer.load(checkpoint)
    other, _ = reference = one()
    train(*reference, 4)
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert model[1].num_batches_tracked == 4


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
            with pytest.raises(SnapshotError, match="in parameter groups of their own"):
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
    optimizer.base.state[next(iter(optimizer.param_groups[0]["params"]))] = {"old_dirs": []}
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
    with pytest.raises(SnapshotError, match=message):
        optimizer.load(tmp_path / "other")
    assert same(before, dict(model.state_dict()))
    assert not optimizer.base.state


AVERAGED = Problem({"tau": 4, "buffers": "average"}, options={"momentum": 0.875})
MAINTAINED = Problem({"tau": 4}, options={"momentum": 0.875})
AR_SGD = Problem({"tau": None, **LOCAL_SGD, "gradients": "all"}, options={"momentum": 0.5})
NOAVERAGE = Problem({"base": "sgp", "topology": "star", "tau": 4, "average": False})
RESIZES = {
    "an outer step": (RESET, 4, False, None),
    "buffers averaged": (AVERAGED, 4, False, None),
    "no buffers": (Problem({"tau": 4}), 8, False, None),
    "gradients averaged": (AR_SGD, 3, False, None),
    "a join": (Problem({"tau": 4}), 6, True, None),
    "gossip at an outer step": (Problem({"base": "sgp", "overlap": True, "tau": 4}), 4, False, None),
    "before the first step": (MAINTAINED, 0, False, None),
    "the middle of a block": (RESET, 5, False, "its own parameters and statistics.*base optimizer's buffers"),
    "buffers maintained": (MAINTAINED, 4, False, "its own the base optimizer's buffers, which.*buffers='reset'"),
    "a join with buffers": (RESET, 6, True, "its own the base optimizer's buffers"),
    "gossip": (Problem({"base": "sgp", "topology": "star", "tau": 4}), 3, False, "its own parameters.*numerators"),
    "in flight": (Problem({"base": "sgp", "overlap": True, "tau": 4}), 3, False, "its own .*messages in flight"),
    "noaverage": (NOAVERAGE, 4, False, "its own .*slow momentum"),
}


@pytest.mark.parametrize("what", RESIZES)
def test_another_number_of_workers_where_nothing_of_a_worker_is_lost(what, tmp_path):
    problem, steps, join, message = RESIZES[what]
    before = saved(tmp_path / "checkpoint", 2, steps, problem, join)
    if message is not None:
        with pytest.raises(ValueError, match=f"one of 2 workers, this job has 3, and each of those has {message}"):
            loaded(tmp_path / "checkpoint", 3, problem)
        return
    for workers in (1, 3):
        for each in loaded(tmp_path / "checkpoint", workers, problem):
            assert all(same(each[key], before[0][key]) for key in ("x", "anchor", "v") if key in each)
        assert np.isfinite(loaded(tmp_path / "checkpoint", workers, problem, then=5)[0]["x"]).all()


def test_workers_that_are_equal_up_to_rounding_keep_their_own_and_any_one_serves_all(tmp_path):
    """As those of two frameworks are after an outer step."""

    def work(comm):
        model, optimizer = build(RESET, comm, comm.rank)
        advance(RESET, model, optimizer, comm.rank, range(4))
        if comm.rank == 1:
            with torch.no_grad():
                model.parts[0] *= 1 + 2.0**-52
        optimizer.save(tmp_path / "checkpoint")
        return model.flat()

    before = ThreadWorld(2).run(work)
    assert not same(*before)
    assert all(same(each["x"], mine) for each, mine in zip(loaded(tmp_path / "checkpoint", 2), before, strict=True))
    assert all(same(each["x"], before[0]) for each in loaded(tmp_path / "checkpoint", 3))


def test_rates_that_are_equal_up_to_rounding_or_differ_are_those_of_rank_0_for_another_number(tmp_path):
    for rates in ((0.1, float(np.float32(0.1))), (0.1, 0.2)):

        def work(comm, rates=rates):
            model, optimizer = build(RESET, comm, comm.rank)
            advance(RESET, model, optimizer, comm.rank, range(4))
            for group in optimizer.param_groups:
                group["lr"] = rates[comm.rank]
            optimizer.save(tmp_path / "checkpoint")

        def rate(comm):
            _, optimizer = build(RESET, comm, comm.rank)
            optimizer.load(tmp_path / "checkpoint")
            return optimizer.param_groups[0]["lr"]

        ThreadWorld(2).run(work)
        assert ThreadWorld(2).run(rate) == list(rates), "as many workers have their own"
        assert ThreadWorld(3).run(rate) == [0.1] * 3


def test_a_failure_of_one_is_an_error_of_all_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint"
    before = saved(path, 2, 3)
    files = sorted(tmp_path.iterdir())
    real = safefile.save_file
    for failing in ("rank1", "checkpoint"):

        def save(arrays, file, failing=failing, **settings):
            if file.name.endswith(failing) or f"{failing}-" in file.name:
                raise OSError("no space left on device")
            real(arrays, file, **settings)

        monkeypatch.setattr(safefile, "save_file", save)

        def work(comm):
            model, optimizer = build(RESET, comm, comm.rank)
            advance(RESET, model, optimizer, comm.rank, range(6))
            with pytest.raises((OSError, ValueError), match="no space left on device"):
                optimizer.save(path)

        ThreadWorld(2).run(work)
        assert all(same(a, b) for a, b in zip(loaded(path, 2), before, strict=True))
        assert set(files) <= set(tmp_path.iterdir())
    monkeypatch.undo()
    saved(path, 2, 7)
    assert len(list(tmp_path.iterdir())) == 3, "what belongs to other checkpoints is gone"
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_workers_that_do_not_mean_the_same_are_told(tmp_path):
    def work(comm):
        model, optimizer = build(RESET, comm, comm.rank)
        with pytest.raises(ValueError, match="rank 1 differs from rank 0: path"):
            optimizer.save(tmp_path / f"checkpoint{comm.rank}")
        advance(RESET, model, optimizer, comm.rank, range(1 + comm.rank))
        with pytest.raises(ValueError, match="not at the same step: rank 0 step 1, rank 1 step 2"):
            optimizer.save(tmp_path / "checkpoint")
        optimizer._averaging = True
        with pytest.raises(RuntimeError, match="within averaged_parameters"):
            optimizer.save(tmp_path / "checkpoint")

    ThreadWorld(2).run(work)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_run_in_place_of_one_workers_file(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    saved(tmp_path / "a" / "checkpoint", 2, 3)
    saved(tmp_path / "b" / "checkpoint", 2, 2)
    (theirs,) = (tmp_path / "b").glob("*.rank1-*")
    (ours,) = (tmp_path / "a").glob("*.rank1-*")
    shutil.copy(theirs, ours)
    with pytest.raises(ValueError, match="its content is another"):
        loaded(tmp_path / "a" / "checkpoint", 2)
    ours.unlink()
    with pytest.raises(ValueError, match="is missing: it belongs to"):
        loaded(tmp_path / "a" / "checkpoint", 2)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    saved(tmp_path / "c" / "checkpoint", 2, 1)

    def work(comm):  # each sees another folder under one name, say
        build(RESET, comm, comm.rank)[1].load(tmp_path / "bc"[comm.rank] / "checkpoint")

    with pytest.raises(ValueError, match="rank 1 differs from rank 0: checkpoint"):
        ThreadWorld(2).run(work)


def test_momentum_in_the_units_of_both_frameworks():
    b = np.random.default_rng(0).normal(size=50)
    m = converted("x", b, "velocity", 0.3)
    np.testing.assert_allclose(m, -0.3 * b, rtol=1e-15)
    assert not np.array_equal(converted("x", m, "momentum", 0.3), b), "a conversion rounds, and so is not undone"
    carried = Carried()
    carried.taken("x", b, 0.3)
    assert carried.buffers("velocity", {"x": m})["momentum"]["x"] is b
    assert carried.buffers("velocity", {"x": m * 2}) == {"velocity": {"x": pytest.approx(m * 2)}, "momentum": {}}
    assert not carried.buffers("velocity", {"x": m})["momentum"], "once it has moved it is forgotten"
    assert not converted("x", b * 0, "momentum", 0.0).any()
    with pytest.raises(SnapshotError, match="at a learning rate of 0"):
        converted("x", m, "momentum", 0.0)


def test_a_rate_comes_back_as_it_was_given_where_it_was_only_rounded():
    carried, single = Carried(), float(np.float32(0.1))
    carried.taken_rate("x", 0.1)
    assert carried.rate("x", single, np.dtype("float32")) == 0.1
    assert carried.rate("x", single, np.dtype("float64")) == single
    carried.taken_rate("x", single)
    assert carried.rate("x", 0.1, np.dtype("float64")) == 0.1


@pytest.mark.parametrize("tensor", [False, True])
def test_a_rate_that_a_script_has_set_is_saved(tensor, tmp_path):
    def made(rate):
        return one(base=lambda p: torch.optim.SGD(p, lr=torch.tensor(rate) if tensor else rate))[1]

    given, then = (0.1, 0.2) if tensor else (float(np.float32(0.1)), 0.1)
    first = made(0.5)
    safe = tmp_path / "checkpoint"
    first.save(safe)
    facts, arrays, _ = safefile.read(safe)
    arrays["progress/learning_rate"][:] = given  # as Keras has it, or as another PyTorch has that takes no tensor
    safefile.write(safe, facts, arrays)
    optimizer = made(0.5)
    optimizer.load(safe)
    optimizer.save(safe)
    assert safefile.read(safe)[1]["progress/learning_rate"][0] == given
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(then) if tensor else then
    optimizer.save(safe)
    assert safefile.read(safe)[1]["progress/learning_rate"][0] == (float(np.float32(then)) if tensor else then)


def test_arrays_without_elements_and_without_axes(tmp_path):
    arrays = {"a": np.zeros((0, 3)), "b": np.array(2.5), "c": np.arange(6.0).reshape(2, 3).T}
    safefile.write(tmp_path / "file", {"x": [0.1, None]}, arrays)
    facts, found, _ = safefile.read(tmp_path / "file")
    assert facts == {"x": [0.1, None]}
    assert all(np.array_equal(found[key], value) and found[key].shape == value.shape for key, value in arrays.items())
    assert snapshot.worker_file(tmp_path / "file", 3, "0" * 32).name == "file.rank3-0000000000000000"


def test_files_have_the_rights_that_new_files_have(tmp_path):
    (tmp_path / "plain").touch()
    safefile.write(tmp_path / "file", {}, {})
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_killed_saves_left_is_removed_by_the_next(tmp_path):
    ours = [".123.checkpoint", ".4.checkpoint.rank1-0123456789abcdef"]
    theirs = [".123.checkpoint2", ".123.other", ".x.checkpoint", "123.checkpoint", ".4.checkpoint.rank1-0123.old"]
    for name in ours + theirs:
        (tmp_path / name).touch()
    saved(tmp_path / "checkpoint", 2, 3)
    names = {file.name for file in tmp_path.iterdir()}
    assert not names & set(ours)
    assert set(theirs) < names


def test_file_systems_that_can_not_bring_a_folder_to_the_disk(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor, folder, file):
        error = folder if stat.S_ISDIR(os.fstat(descriptor).st_mode) else file
        if error:
            raise OSError(error, os.strerror(error))
        real(descriptor)

    for folder, file, passes in (
        (errno.EINVAL, 0, True),
        (errno.ENOTSUP, 0, True),
        (errno.EIO, 0, False),
        (0, errno.EINVAL, False),
    ):
        monkeypatch.setattr(os, "fsync", functools.partial(fsync, folder=folder, file=file))
        with contextlib.nullcontext() if passes else pytest.raises(OSError, match=os.strerror(folder or file)):
            safefile.write(tmp_path / "file", {}, {})
