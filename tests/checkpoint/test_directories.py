"""Workers that do not write to one directory."""

from dataclasses import replace

import pytest
import torch

from hvd_slowmo.checkpoint import job
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo


def optimizer_of(comm):
    model = torch.nn.Linear(2, 1)
    return SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm, tau=2)


def test_another_directory_on_a_rank_is_refused_before_anything_is_written(tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()

    def work(comm):
        optimizer = optimizer_of(comm)
        with pytest.raises(ValueError, match="rank 1 differs from rank 0: path"):
            optimizer.save(tmp_path / str(comm.rank) / "x")

    ThreadWorld(2).run(work)
    assert not [file for number in range(2) for file in (tmp_path / str(number)).iterdir()]


def test_a_directory_of_which_each_host_has_its_own_is_refused(tmp_path, monkeypatch):
    """The path is the same, and rank 1's host writes into a directory that rank 0 does not see."""
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    write_own = job.write_own
    elsewhere = tmp_path / "1" / "x"
    monkeypatch.setattr(
        job,
        "write_own",
        lambda worker, comm, common: write_own(replace(worker, path=elsewhere) if comm.rank else worker, comm, common),
    )

    def work(comm):
        optimizer = optimizer_of(comm)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 1.0 + comm.rank)
        optimizer.step()  # within a block each worker has its own parameters
        with pytest.raises(ValueError, match=r"one directory for all workers: rank 0 does not see .* ranks 1 have"):
            optimizer.save(tmp_path / "0" / "x")

    ThreadWorld(2).run(work)
    assert not (tmp_path / "0" / "x").exists()
