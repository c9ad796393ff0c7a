"""The files of a checkpoint: written by all workers or by none, and found again."""

import contextlib
import errno
import functools
import os
import shutil
import stat

import numpy as np
import pytest

from hvd_slowmo.checkpoint import file as safefile
from hvd_slowmo.checkpoint.facts import WorkerFacts
from hvd_slowmo.checkpoint.paths import worker_file
from hvd_slowmo.comm.threads import ThreadWorld
from support.checkpoints import RESET, loaded, saved
from support.trainings.pytorch import advance, build, same

FACTS = WorkerFacts(rank=1, workers=2)


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
        optimizer.worker.averaging = True
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
    with pytest.raises(ValueError, match="its content differs"):
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


def test_arrays_without_elements_and_without_axes(tmp_path):
    arrays = {"a": np.zeros((0, 3)), "b": np.array(2.5), "c": np.arange(6.0).reshape(2, 3).T}
    safefile.write(tmp_path / "file", FACTS, arrays)
    facts, found, _ = safefile.read(tmp_path / "file")
    assert facts == FACTS
    assert all(np.array_equal(found[key], value) and found[key].shape == value.shape for key, value in arrays.items())
    assert worker_file(tmp_path / "file", 3, "0" * 32).name == "file.rank3-0000000000000000"


def test_files_have_the_rights_that_new_files_have(tmp_path):
    (tmp_path / "plain").touch()
    safefile.write(tmp_path / "file", FACTS, {})
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


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
            safefile.write(tmp_path / "file", FACTS, {})
