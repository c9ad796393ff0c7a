"""Periodic checkpoints of PyTorch workers on threads: saved beside the training, resumed, removed, and reported."""

import errno
import os
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from hvd_slowmo.checkpoint import file as safefile
from hvd_slowmo.checkpoint import saving
from hvd_slowmo.checkpoint.values import dump, load
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.errors import CheckpointError, CheckpointFileError
from hvd_slowmo.torch import Checkpoints, SlowMo
from support.problems import Problem
from support.trainings.pytorch import advance, build, held, same

MAINTAIN = Problem({"tau": 4}, options={"momentum": 0.875})
RESET = Problem({"tau": 4, "inner_state": "reset"}, options={"momentum": 0.875})
ALL = Problem({"tau": None, "gradients": "all", "alpha": 1.0, "beta": 0.0}, options={"momentum": 0.875})
SHARD = Problem({"tau": 4, "shard": True, "inner_state": "reset"})
DPSGD = Problem({"tau": 3, "gossip": "dpsgd"})


class Count:
    """A part of a script with a state that each worker has for itself."""

    def __init__(self, rank):
        self.taken = Counter({rank: 1})

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


def run(folder, workers, stop, problem=MAINTAIN, every=4, keep=3, finish=True, objects=True):
    """Train to a step as the same command line would; return start, values, and own state of each worker."""

    def work(comm):
        model, optimizer = build(problem, comm, comm.rank)
        checkpoints, count = Checkpoints(folder, every=every, keep=keep), Count(comm.rank)
        start = checkpoints.resume(optimizer, **({"count": count} if objects else {}))
        for step in range(start, stop):
            advance(problem, model, optimizer, comm.rank, range(step, step + 1))
            count.taken[comm.rank] += 1
            checkpoints.step(step=step + 1, noise=np.full(2, comm.rank + step / 8))
        if finish:
            checkpoints.finish()
        return start, held(model, optimizer), count.taken, checkpoints.values

    return ThreadWorld(workers).run(work)


def names(folder):
    return sorted(path.name for path in folder.glob("step-*.slowmo"))


@pytest.mark.parametrize("problem", [MAINTAIN, RESET, ALL, SHARD, DPSGD], ids=lambda problem: str(problem.config))
@pytest.mark.slow
@pytest.mark.sample("{'tau': 4}", "{'tau': 3, 'gossip': 'dpsgd'}", "{'tau': 4, 'shard': True, 'inner_state': 'reset'}")
def test_an_interrupted_run_goes_on_bitwise_as_the_one_without_a_stop(problem, tmp_path):
    whole = run(tmp_path / "whole", 3, 14, problem)
    run(tmp_path / "again", 3, 11, problem)  # the steps after the last checkpoint are lost, and taken again
    resumed = run(tmp_path / "again", 3, 14, problem)
    for rank, (first, again) in enumerate(zip(whole, resumed, strict=True)):
        saved = 9 if problem is DPSGD else 8
        assert first[0] == 0
        assert again[0] == saved
        assert same(first[1], again[1])
        assert first[2] == again[2] == Counter({rank: 15})
        assert again[3]["step"] == saved
        assert again[3]["noise"].tolist() == [rank + (saved - 1) / 8] * 2


@pytest.mark.slow
def test_saves_follow_the_count_of_steps_at_outer_steps_and_three_are_kept(tmp_path):
    run(tmp_path, 2, 24, RESET, every=5)
    # Multiples of 5 are passed at 5, 10, 15, 20; the outer steps after them are 8, 12, 16 and 20.
    assert names(tmp_path) == [f"step-{step:09d}.slowmo" for step in (12, 16, 20)]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_with_averaged_gradients_every_step_can_be_saved(tmp_path):
    run(tmp_path, 2, 7, ALL, every=3, keep=1)
    assert names(tmp_path) == ["step-000000006.slowmo"]


@pytest.mark.slow
def test_workers_files_of_removed_checkpoints_go_with_them(tmp_path):
    run(tmp_path, 2, 20, MAINTAIN, keep=1)
    assert names(tmp_path) == ["step-000000020.slowmo"]
    assert len(list(tmp_path.iterdir())) == 3  # the common file, and one for each worker's momentum


@pytest.mark.slow
def test_nothing_is_saved_while_a_worker_is_in_its_join(tmp_path):
    """A worker in a join answers outer steps only: a save among the others would wait for it for ever."""

    def work(comm):
        model, optimizer = build(RESET, comm, comm.rank)
        checkpoints = Checkpoints(tmp_path, every=2)
        checkpoints.resume(optimizer)
        for step in range((10, 5)[comm.rank]):
            advance(RESET, model, optimizer, comm.rank, range(step, step + 1))
            checkpoints.step()
        optimizer.join()
        before = names(tmp_path) if comm.rank == 0 else None
        checkpoints.step()
        checkpoints.finish()
        return before

    assert ThreadWorld(2).run(work)[0] == []  # the save of step 4 had no later point in common
    assert names(tmp_path) == ["step-000000004.slowmo", "step-000000010.slowmo"]


def test_a_damaged_newest_checkpoint_is_left_out_with_a_warning(tmp_path, caplog):
    run(tmp_path, 2, 12)
    newest = tmp_path / "step-000000012.slowmo"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    for start, *_ in run(tmp_path, 2, 9):
        assert start == 8
    (record,) = caplog.records
    assert "step-000000012.slowmo is left out, since it can't be read whole: rank 0: " in record.getMessage()


@pytest.mark.slow
def test_a_missing_workers_file_damages_a_checkpoint_for_all(tmp_path, caplog):
    run(tmp_path, 2, 8)
    next(tmp_path.glob("step-000000008.slowmo.rank1-*")).unlink()
    for start, *_ in run(tmp_path, 2, 5):
        assert start == 4
    assert "rank 1: " in caplog.text


def test_a_directory_of_damaged_checkpoints_is_not_begun_anew(tmp_path):
    run(tmp_path, 2, 4)
    (tmp_path / "step-000000004.slowmo").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole; rank 0: .*step-000000004"):
        run(tmp_path, 2, 8)


def test_a_full_disk_is_reported_on_every_worker_and_training_may_go_on(tmp_path, monkeypatch):
    original = safefile.save_file

    def save_file(arrays, target, **settings):
        if "000000008.slowmo.rank1" in target.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        original(arrays, target, **settings)

    monkeypatch.setattr(safefile, "save_file", save_file)
    world = threading.Barrier(2)

    def work(comm):
        model, optimizer = build(MAINTAIN, comm, comm.rank)
        checkpoints = Checkpoints(tmp_path, every=4)
        checkpoints.resume(optimizer)
        errors = []
        for step in range(24):
            advance(MAINTAIN, model, optimizer, comm.rank, range(step, step + 1))
            world.wait()
            try:
                checkpoints.step()
            except CheckpointFileError as error:
                errors.append((step + 1, error.errno, str(error)))
        checkpoints.finish()
        return errors, held(model, optimizer)

    (first, x), (second, y) = ThreadWorld(2).run(work)
    assert first == second
    ((step, number, text),) = first
    assert step in (12, 16)  # the first or second outer step after it
    assert number == errno.ENOSPC
    assert "rank 1: " in text
    assert same(x["anchor"], y["anchor"])
    assert "step-000000024.slowmo" in names(tmp_path)
    assert "step-000000008.slowmo" not in names(tmp_path)


def test_state_that_needs_pickle_is_refused_on_every_worker(tmp_path):
    def work(comm):
        model, optimizer = build(RESET, comm, comm.rank)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.resume(optimizer)
        advance(RESET, model, optimizer, comm.rank, range(4))
        checkpoints.save(best=torch.ones(2) if comm.rank else 3)
        with pytest.raises(TypeError, match=r"rank 1: best can't be saved without pickle") as caught:
            checkpoints.finish()
        return str(caught.value)

    assert len(set(ThreadWorld(2).run(work))) == 1
    assert names(tmp_path) == []


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    """The thread waits for a disk; no step waits for the thread, and what it writes is the state of its step."""
    disk, begun = threading.Event(), threading.Event()
    original = saving.checksum

    def checksum(array):
        begun.set()
        assert disk.wait(60)
        return original(array)

    monkeypatch.setattr(saving, "checksum", checksum)

    def work(comm):
        model, optimizer = build(RESET, comm, comm.rank)
        checkpoints = Checkpoints(tmp_path, every=4)
        checkpoints.resume(optimizer)
        advance(RESET, model, optimizer, comm.rank, range(4))
        checkpoints.step()
        saved = held(model, optimizer)
        assert begun.wait(60)
        for step in range(4, 7):
            advance(RESET, model, optimizer, comm.rank, range(step, step + 1))
            checkpoints.step()
        assert names(tmp_path) == []
        disk.set()
        checkpoints.finish()
        return saved, held(model, optimizer)

    at_save, later = zip(*ThreadWorld(2).run(work), strict=True)
    assert not same(at_save[0], later[0])
    for (start, values, *_), saved in zip(run(tmp_path, 2, 4, RESET, objects=False), at_save, strict=True):
        assert start == 4
        assert same(values, saved)


def test_another_number_of_workers_resumes_and_begins_each_workers_own_state_anew(tmp_path, caplog):
    before = run(tmp_path, 2, 4, RESET)
    after = run(tmp_path, 3, 4, RESET)
    for rank, (start, values, taken, kept) in enumerate(after):
        assert start == 4
        assert same(values, before[0][1])
        assert taken == Counter({rank: 1})
        assert kept == {"step": 4}  # the same on all; each worker had its own noise
    assert "`count` begins anew: each of 2 workers had its own state of it, and now there are 3." in caplog.text


def test_a_learning_rate_scheduler_resumes_with_the_optimizer(tmp_path):
    def train(stop, folder):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, tau=2)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], gamma=0.5)
        checkpoints = Checkpoints(folder, every=4)
        rates = []
        for _ in range(checkpoints.resume(optimizer, scheduler=scheduler), stop):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
            checkpoints.step()
        checkpoints.finish()
        return model.weight.detach(), rates

    whole, rates = train(9, tmp_path / "whole")
    assert train(6, tmp_path / "again")[1] == rates[:6]
    again, tail = train(9, tmp_path / "again")
    assert tail == rates[4:]
    assert torch.equal(whole, again)


def test_a_checkpoint_of_the_series_loads_as_any_other(tmp_path):
    first = run(tmp_path, 2, 4, RESET)

    def work(comm):
        model, optimizer = build(RESET, comm, comm.rank)
        optimizer.load(tmp_path / "step-000000004.slowmo")
        return held(model, optimizer)

    assert all(same(values, each[1]) for values, each in zip(ThreadWorld(2).run(work), first, strict=True))


def test_unfinished_files_of_a_killed_job_are_removed_at_the_next_start(tmp_path):
    run(tmp_path, 1, 4)
    (tmp_path / "step-000000008.slowmo.rank0-0123456789abcdef").write_bytes(b"half")
    for name in (".step-000000008.slowmo.12.slowmo-tmp", ".step-000000004.slowmo.12.slowmo-tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, 1, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-000000004.slowmo"]


def test_ranks_that_name_other_directories_are_refused(tmp_path):
    def work(comm):
        _, optimizer = build(RESET, comm, comm.rank)
        Checkpoints(tmp_path / str(comm.rank)).resume(optimizer)

    with pytest.raises(ValueError, match="rank 1 differs from rank 0: folder: it has"):
        ThreadWorld(2).run(work)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"every": 0}, ValueError, "`every` must be a positive integer or None"),
        ({"every": 1.5}, TypeError, "`every` must be a positive integer or None"),
        ({"keep": 0}, ValueError, "`keep` must be a positive integer"),
    ],
)
def test_wrong_arguments_are_refused(settings, kind, words, tmp_path):
    with pytest.raises(kind, match=words):
        Checkpoints(tmp_path, **settings)


def test_a_step_before_the_resume_says_what_is_missing(tmp_path):
    with pytest.raises(RuntimeError, match=r"Call resume\(optimizer\) first"):
        Checkpoints(tmp_path).step()


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"a": [1, 2.5, True, "x", None]},
        {3: 1, (1, 2): "pair"},
        {"__tuple__": 1},
        Counter({30: 1, 60: 2}),
        (1, (2.0, [3])),
        b"\x00\xff",
        float("inf"),
    ],
    ids=repr,
)
def test_values_come_back_as_they_were(value):
    again = load(dump("value", value))
    assert type(again) is type(value)
    assert again == value


def test_arrays_come_back_as_they_were():
    value = np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2]
    again = load(dump("value", {"x": value}))["x"]
    assert again.dtype == value.dtype
    assert np.array_equal(again, value)
