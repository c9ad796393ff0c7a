"""Damaged checkpoints and those of another training are refused, and nothing is touched then."""

import os
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from hvd_slowmo.checkpoint import file as safefile
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.errors import CheckpointError
from hvd_slowmo.torch import SlowMoConfig
from support.checkpoints import RESET, damaged, one, saved
from support.trainings.pytorch import advance, build, held, same


@pytest.mark.slow
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
        before = (
            held(model, optimizer),
            optimizer.state_dict()["state"],
            optimizer.worker.progress,
            optimizer.param_groups,
        )
        before = ({k: v.copy() for k, v in before[0].items()}, str(before[1:]))
        for number in range(240):
            if comm.rank == 0:
                shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
                shutil.copytree(path.parent, tmp_path / "damaged")
                kinds.add(damaged([tmp_path / "damaged" / name for name in names], rng))
            comm.gather(f"{number}", None)
            with pytest.raises(ValueError, match=r"altered|damaged|missing|belongs|alone\. |is no|rank \d: "):
                optimizer.load(tmp_path / "damaged" / "checkpoint")
            comm.gather(f"{number}.tried", None)
        now = (optimizer.state_dict()["state"], optimizer.worker.progress, optimizer.param_groups)
        assert same(before[0], held(model, optimizer))
        assert before[1] == str(now)
        optimizer.load(path)
        assert optimizer.steps == 3

    ThreadWorld(2).run(work)
    assert len(kinds) == 7


OTHERS = {
    "settings": (lambda: one(SlowMoConfig(tau=4)), "saved with tau=3, this optimizer has tau=4"),
    "wider": (
        lambda: one(model=nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))),
        r"another model: its tensor 0 is 0.linear.weight \(parameter, float32, shape \(4, 3\)\), here it is .*\(5, 3\)",
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
        "that of SGD, this one is Adam or AdamW, which can't read it",
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
    with pytest.raises(CheckpointError, match=message):
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
        "plain.safetensors": "is a safetensors file, but no checkpoint",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            optimizer.load(folder / name)
    with pytest.raises(CheckpointError, match="in an existing directory"):
        optimizer.save(folder / "nowhere" / "checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(safefile, "FORMAT", 4)
        optimizer.save(folder / "newer")
    with pytest.raises(CheckpointError, match="has format 4, this version of hvd-slowmo reads format 3"):
        optimizer.load(folder / "newer")


def test_relative_paths_in_different_working_directories_are_refused(tmp_path, monkeypatch):
    """Thread by thread, because a process has one working directory."""
    here = threading.local()
    original = os.getcwd
    monkeypatch.setattr(os, "getcwd", lambda: getattr(here, "directory", None) or original())

    def work(comm):
        directory = tmp_path / f"rank{comm.rank}"
        directory.mkdir()
        here.directory = str(directory)
        _, optimizer = build(RESET, comm, comm.rank)
        with pytest.raises(ValueError, match=r"rank 1 differs from rank 0: path: it has '.*rank1/checkpoint'"):
            optimizer.save("checkpoint")
        assert not list(directory.iterdir())

    ThreadWorld(2).run(work)
