"""Leftovers of killed saves are removed by the next save or by `inspect --clean`; a running save keeps its files."""

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from hvd_slowmo.checkpoint.leftovers import clean, writing
from hvd_slowmo.cli.main import main
from hvd_slowmo.errors import CheckpointError
from support.checkpoints import files, loaded, saved
from support.trainings.pytorch import same

STALE = (".checkpoint.123.slowmo-tmp", ".checkpoint.rank1-0123456789abcdef.4.slowmo-tmp")
UNLISTED = "checkpoint.rank1-0123456789abcdef"
FOREIGN = (".checkpoint2.123.slowmo-tmp", ".123.checkpoint", "old-checkpoint.rank1-0123", ".checkpoint.x.slowmo-tmp")

WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from hvd_slowmo.checkpoint import file
from hvd_slowmo.checkpoint.facts import WorkerFacts
from hvd_slowmo.checkpoint.leftovers import writing

def hang(arrays, path, **settings):
    Path(path).with_name(".tmpAbC").write_bytes(bytes(100))  # as the library does
    print("writing", flush=True)
    time.sleep(60)

file.save_file = hang
with writing(Path(sys.argv[1])):
    file.write(Path(sys.argv[1]), WorkerFacts(rank=0, workers=1), {"x": np.ones(3)})
"""


@contextmanager
def writer(path):
    """Run a process that is in the middle of a save, and kill it at the end."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "writing\n"
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def names(directory):
    return {file.name for file in directory.iterdir()}


def leave(directory):
    for name in (*STALE, *FOREIGN):
        (directory / name).mkdir()
        (directory / name / ".tmpAbC").touch()
    (directory / UNLISTED).touch()


def test_the_next_save_removes_what_killed_saves_left_and_nothing_else(tmp_path):
    leave(tmp_path)
    saved(tmp_path / "checkpoint", 2, 3)
    assert names(tmp_path) == {*FOREIGN, *(f"checkpoint{end}" for end in files(tmp_path / "checkpoint"))}
    assert len(files(tmp_path / "checkpoint")) == 3, "one for both workers, and one each"


def test_a_save_that_fails_has_removed_them_too(tmp_path):
    """Otherwise saves that are killed one after the other fill the disk."""
    leave(tmp_path)
    with pytest.raises(ValueError, match="can't be saved"):
        saved(tmp_path / "checkpoint", 2, 3, before=refuse_to_save)
    assert names(tmp_path) == set(FOREIGN)


def refuse_to_save(optimizer):
    def refuse(*_):
        raise ValueError("it can't be saved")

    optimizer.worker.state = refuse


def test_clean_keeps_the_checkpoint_and_the_files_of_others(tmp_path, capsys):
    path = tmp_path / "checkpoint"
    values = saved(path, 2, 3)
    whole = names(tmp_path)
    leave(tmp_path)
    assert main(["inspect", "--clean", str(path)]) == 0
    assert {line.rpartition("/")[2] for line in capsys.readouterr().out.split()[1::2]} == {*STALE, UNLISTED}
    assert names(tmp_path) == whole | set(FOREIGN)
    assert all(same(a, b) for a, b in zip(loaded(path, 2), values, strict=True))
    assert main(["inspect", "--clean", str(path)]) == 0
    assert "have left nothing" in capsys.readouterr().out


def test_clean_of_a_directory_finds_every_checkpoint(tmp_path):
    leave(tmp_path)
    saved(tmp_path / "other", 2, 3)
    whole = {name for name in names(tmp_path) if name.startswith("other")}
    clean(tmp_path)
    assert names(tmp_path) == whole | {".123.checkpoint", "old-checkpoint.rank1-0123", ".checkpoint.x.slowmo-tmp"}


def test_workers_files_are_kept_beside_a_common_file_that_can_not_be_read(tmp_path):
    path = tmp_path / "checkpoint"
    saved(path, 2, 3)
    path.write_bytes(path.read_bytes()[:-1])
    whole = names(tmp_path)
    leave(tmp_path)
    assert {file.name for file in clean(path)} == set(STALE)
    assert names(tmp_path) == whole | set(FOREIGN) | {UNLISTED}


def test_files_of_a_running_save_are_kept_until_it_is_killed(tmp_path, capsys):
    path = tmp_path / "checkpoint"
    saved(path, 2, 3)
    whole = names(tmp_path)
    with writer(path):
        running = names(tmp_path)
        assert len(running - whole) == 2, "the lock and a directory"
        assert main(["inspect", "--clean", str(path)]) == 1
        assert "is being written by another process" in capsys.readouterr().err
        assert clean(tmp_path) == []
        with pytest.raises(CheckpointError, match="is being written by another process"):
            saved(path, 2, 3)
        assert names(tmp_path) == running
    assert names(tmp_path) == running
    assert clean(path)
    assert names(tmp_path) == whole


def test_a_temporary_directory_is_closed_to_other_accounts(tmp_path):
    with writer(tmp_path / "checkpoint"):
        (directory,) = tmp_path.glob("*slowmo-tmp")
        assert directory.stat().st_mode & 0o777 == 0o700


def test_a_file_system_without_locks_takes_checkpoints_and_is_not_cleaned(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    leave(tmp_path)
    saved(tmp_path / "checkpoint", 2, 3)
    assert not names(tmp_path) & {*STALE, UNLISTED}, "every worker has written its own by then"
    leave_again = tmp_path / STALE[0]
    leave_again.mkdir()
    with pytest.raises(CheckpointError, match="takes no locks"):
        clean(tmp_path / "checkpoint")
    assert leave_again.exists()


def test_a_lock_is_released_when_its_holder_leaves_even_if_a_forked_process_has_the_file_open(tmp_path, monkeypatch):
    real, copies = fcntl.flock, []

    def flock(descriptor, operation):
        if operation & fcntl.LOCK_EX:
            copies.append(os.dup(descriptor))  # the same open file, as after a fork
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with writing(tmp_path / "checkpoint") as locked:
            assert locked
    assert len(copies) == 2
    assert not names(tmp_path)
    for copy in copies:
        os.close(copy)
