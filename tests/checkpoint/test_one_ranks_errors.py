"""An error of the system on one rank is one type on all of them, and its text names that rank."""

import builtins
import errno
import io
import os
import pathlib
import threading

import pytest

from hvd_slowmo.checkpoint import file as safefile
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.errors import CheckpointError, CheckpointFileError
from support.checkpoints import RESET, loaded, saved
from support.trainings.pytorch import advance, build, held, same

_here = threading.local()


def refused(number):
    return OSError(number, os.strerror(number), "checkpoint")  # PermissionError for EACCES


def errors_of(job, ranks=2):
    """Return what each rank's call has raised."""

    def work(comm):
        _here.rank = comm.rank
        with pytest.raises(Exception) as caught:  # noqa: PT011 - its type is what is compared
            job(comm)
        return caught.value

    return ThreadWorld(ranks).run(work)


def assert_alike(errors, number, rank):
    for error in errors:
        assert type(error) is CheckpointFileError
        assert isinstance(error, CheckpointError)
        assert isinstance(error, OSError)
        assert error.errno == number
        assert f"rank {rank}: " in str(error)
        assert os.strerror(number) in str(error)
    assert len({str(error) for error in errors}) == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_one_rank_may_not_read(rank, number, tmp_path, monkeypatch):
    before = saved(tmp_path / "checkpoint", 2, 3)
    original = io.open

    def opened(file, *arguments, **settings):
        if getattr(_here, "rank", None) == rank and str(file) == str(tmp_path / "checkpoint"):
            raise refused(number)
        return original(file, *arguments, **settings)

    monkeypatch.setattr(io, "open", opened)  # pathlib's
    monkeypatch.setattr(builtins, "open", opened)

    def load(comm):
        model, optimizer = build(RESET, comm, comm.rank)
        advance(RESET, model, optimizer, comm.rank, range(1))
        own = {name: value.copy() for name, value in held(model, optimizer).items()}
        try:
            optimizer.load(tmp_path / "checkpoint")
        finally:
            assert same(own, held(model, optimizer))

    assert_alike(errors_of(load), number, rank)
    monkeypatch.undo()
    assert all(same(a, b) for a, b in zip(loaded(tmp_path / "checkpoint", 2), before, strict=True))


def test_a_directory_that_one_rank_may_not_enter(tmp_path, monkeypatch):
    saved(tmp_path / "checkpoint", 2, 3)
    original = pathlib.Path.is_file

    def is_file(path):
        if getattr(_here, "rank", None) == 1:
            raise refused(errno.EACCES)
        return original(path)

    monkeypatch.setattr(pathlib.Path, "is_file", is_file)
    errors = errors_of(lambda comm: build(RESET, comm, comm.rank)[1].load(tmp_path / "checkpoint"))
    assert_alike(errors, errno.EACCES, 1)


@pytest.mark.parametrize("file", ["checkpoint", "checkpoint.rank1-"])
def test_a_disk_that_is_full_for_one_rank(file, tmp_path, monkeypatch):
    """Rank 0 writes the common file, and rank 1 its own."""
    path = tmp_path / "checkpoint"
    before = saved(path, 2, 3)
    original = safefile.save_file

    def save_file(arrays, target, **settings):
        if target.name.endswith(file) or (file.endswith("-") and file in target.name):
            raise refused(errno.ENOSPC)
        original(arrays, target, **settings)

    monkeypatch.setattr(safefile, "save_file", save_file)

    def save(comm):
        model, optimizer = build(RESET, comm, comm.rank)
        advance(RESET, model, optimizer, comm.rank, range(6))
        optimizer.save(path)

    assert_alike(errors_of(save), errno.ENOSPC, int(file.endswith("-")))
    monkeypatch.undo()
    assert all(same(a, b) for a, b in zip(loaded(path, 2), before, strict=True))


def test_a_single_worker_raises_the_same_type(tmp_path, monkeypatch):
    def save_file(*_, **settings):
        raise refused(errno.ENOSPC)

    monkeypatch.setattr(safefile, "save_file", save_file)
    (error,) = errors_of(lambda comm: build(RESET, comm, 0)[1].save(tmp_path / "x"), ranks=1)
    assert type(error) is CheckpointFileError
    assert error.errno == errno.ENOSPC


def test_a_directory_that_can_not_be_listed_does_not_fail_a_complete_save(tmp_path, monkeypatch):
    before = saved(tmp_path / "checkpoint", 2, 3)

    def glob(path, pattern):
        raise refused(errno.EIO)

    monkeypatch.setattr(pathlib.Path, "glob", glob)
    saved(tmp_path / "checkpoint", 2, 3)
    monkeypatch.undo()
    assert all(same(a, b) for a, b in zip(loaded(tmp_path / "checkpoint", 2), before, strict=True))
