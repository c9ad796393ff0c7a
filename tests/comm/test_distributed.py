"""torch.distributed as a transport: choosing it, misuse that names would find, refusals, and other groups."""

import sys
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hvd_slowmo.comm.absence import absent_ranks
from hvd_slowmo.comm.launcher import IGNORE
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from hvd_slowmo_torch.comm import workers as choice
from hvd_slowmo_torch.comm.store_board import StoreBoard


@pytest.fixture
def world(monkeypatch):
    """world(horovod=, distributed=, **environment): pretend that these are initialized under a launcher."""

    def world(horovod=False, distributed=False, **environment):
        for name in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_ID", "WORLD_SIZE", IGNORE):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        module = types.SimpleNamespace(is_initialized=lambda: horovod)
        monkeypatch.setitem(sys.modules, "horovod.torch", module)
        monkeypatch.setattr(dist, "is_initialized", lambda: distributed)

    return world


@pytest.mark.parametrize(
    ("state", "transport"),
    [
        ({}, "horovod"),
        ({"horovod": True}, "horovod"),
        ({"distributed": True}, "torch"),
        ({"WORLD_SIZE": "2"}, "torch"),
        ({"HOROVOD_SIZE": "2"}, "horovod"),
        ({"HOROVOD_SIZE": "2", "WORLD_SIZE": "2"}, "horovod"),
        ({"horovod": True, "WORLD_SIZE": "2"}, "horovod"),
        ({"distributed": True, "HOROVOD_SIZE": "2"}, "torch"),
    ],
)
def test_the_initialized_transport_is_taken_or_else_the_launchers(world, state, transport):
    world(**state)
    assert choice.chosen() == transport


def test_two_initialized_transports_need_a_word(world):
    world(horovod=True, distributed=True)
    with pytest.raises(ValueError, match=r"both .* are initialized.*transport='horovod' or transport='torch'"):
        choice.chosen()
    assert choice.chosen(transport="torch") == "torch"
    assert choice.chosen(transport="horovod") == "horovod"
    assert choice.chosen(process_group=object()) == "torch"
    assert choice.chosen(process_set=object()) == "horovod"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"transport": "mpi"}, r"`transport` must be 'horovod', 'torch' or None\. Received: 'mpi'"),
        ({"process_set": 1, "process_group": 2}, "give one of them"),
        ({"process_set": 1, "transport": "torch"}, "process_set is Horovod's"),
        ({"process_group": 1, "transport": "horovod"}, "process_group torch.distributed's"),
    ],
)
def test_contradictions_are_refused(world, given, words):
    world()
    with pytest.raises(ValueError, match=words):
        SlowMo(torch.optim.SGD([torch.ones(1)]), nn.Linear(1, 1), SlowMoConfig(), **given)


def test_a_script_under_torchrun_that_initializes_nothing_is_told_the_line(world):
    world(WORLD_SIZE="4")
    with pytest.raises(ValueError, match=r"one of 4 workers\. Call hvd_slowmo\.torch\.init\(\) or torch\.distributed"):
        choice.connect()


def test_comm_and_a_group_are_refused():
    from hvd_slowmo.comm.protocol import SoloComm

    model = nn.Linear(1, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`comm` and `process_group` both say"):
        SlowMo(inner, model, SlowMoConfig(), comm=SoloComm(), process_group=object())
    with pytest.raises(ValueError, match="on all ranks only: give no process_group"):
        SlowMo(inner, model, SlowMoConfig(gradients="node"), process_group=object())


def test_workers_that_report_are_not_lost():
    store = dist.HashStore()
    store.set("hvd_slowmo/failed/0_3_5/3", "1")
    assert absent_ranks((0, 3, 5), 0, StoreBoard(store)) == (5,)


def test_sharded_models_are_refused():
    class FSDPModule(nn.Module):  # what torch's fully_shard makes of a module's class
        __module__ = "torch.distributed.fsdp"

    model = nn.Sequential(nn.Linear(1, 1), FSDPModule())
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"1 is sharded \(FSDP\): each worker has another part"):
        SlowMo(inner, model, SlowMoConfig())


@pytest.mark.workers
def test_what_pytorch_spreads_over_workers(distributed_workers):
    for told in distributed_workers(2).run("support.jobs.distributed:spread"):
        assert "weight is sharded (DTensor)" in told["dtensor"]
        assert "DistributedDataParallel over all workers" in told["ddp"]
        assert "gradients='all' averages its gradients a second time" in told["averaged twice"]
        assert told["ddp within nodes"] == "trained"


@pytest.mark.workers
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("other optimizer first", "name, by the order in which optimizers of one name were constructed"),
        ("save on one rank", "rank 0 is at its sum slowmo.ledger"),
    ],
)
def test_different_collectives_are_an_error_on_every_rank(distributed_workers, kind, words):
    told = distributed_workers(2).run("support.jobs.distributed:misuse", kind=kind)
    assert told[0][1] == told[1][1], "the workers are in step again afterwards"
    for said, _ in told:
        assert words in said


@pytest.mark.workers
def test_the_scripts_own_collectives_do_not_mix_with_ours(distributed_workers):
    assert distributed_workers(2).run("support.jobs.distributed:own_collectives") == [True, True]


@pytest.mark.workers
@pytest.mark.slow
def test_a_worker_that_never_comes_is_an_error_after_the_groups_timeout(distributed_workers):
    waiting, _ = distributed_workers(2).outcomes("support.jobs.distributed:late", fatal=True)
    assert "slowmo.ledger" in waiting
    assert "after 1 steps: a collective failed, most likely because rank 1 ended, was killed or has not" in waiting
    assert "come within 2 s; look at the output there" in waiting
    assert "nothing more can be exchanged after torch.distributed's error" in waiting


@pytest.mark.workers
@pytest.mark.slow
def test_nodes_average_gradients(distributed_workers):
    """Two nodes of two workers equal the same on threads."""
    for apart, together in distributed_workers(4).run("support.jobs.distributed:nodes"):
        assert together == pytest.approx(apart, rel=1e-13)
