"""Processes that a launcher has started together, and of which Horovod knows too few."""

import sys
import types

import pytest

from hvd_slowmo.comm.horovod import Workers
from hvd_slowmo.comm.launcher import IGNORE, launched

SLURM_STEP = {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "launcher", "workers"),
    [
        ({}, "no launcher", 1),
        ({"WORLD_SIZE": "4"}, "torchrun or a launcher like it", 4),
        ({"WORLD_SIZE": "1"}, "no launcher", 1),
        ({"WORLD_SIZE": "auto", "PMI_SIZE": ""}, "no launcher", 1),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "mpirun", 3),
        ({"PMI_SIZE": "3"}, "mpirun or srun", 3),
        (SLURM_STEP, "srun", 4),
        ({**SLURM_STEP, "WORLD_SIZE": "4"}, "torchrun or a launcher like it", 4),  # torchrun per node, one worker each
        ({"SLURM_NTASKS": "4"}, "no launcher", 1),  # a batch script
        ({**SLURM_STEP, "SLURM_STEP_ID": "4294967291"}, "no launcher", 1),  # a batch script, too
        ({**SLURM_STEP, "SLURM_STEP_ID": "4294967290"}, "no launcher", 1),  # salloc's interactive shell
        ({**SLURM_STEP, "HOROVOD_SIZE": "2", "WORLD_SIZE": "8"}, "horovodrun", 2),
        ({**SLURM_STEP, IGNORE: "1"}, "no launcher", 1),
        ({**SLURM_STEP, IGNORE: "0"}, "srun", 4),
    ],
)
def test_launchers_are_known_by_their_variables(environment, launcher, workers):
    assert launched(environment)[:2] == (launcher, workers)


@pytest.fixture
def connect(monkeypatch):
    """connect(size, environment): connect under a Horovod with this many workers; None: it is not initialized."""

    class Set:
        ranks = None

        def __init__(self, size):
            self.size = lambda: size

        def included(self):
            return True

    def connect(size, environment, process_set=None):
        for name in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_ID", "WORLD_SIZE", IGNORE):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        horovod = types.SimpleNamespace(
            is_initialized=lambda: size is not None,
            size=lambda: size,
            rank=lambda: 0,
            global_process_set=Set(size or 1),
        )
        monkeypatch.setitem(sys.modules, "horovod_of_this_test", horovod)
        made = Workers("horovod_of_this_test", "PyTorch", "hvd_slowmo.torch", lambda members, node: members)
        return made.connect(process_set and Set(process_set))

    return connect


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "4"}, {"OMPI_COMM_WORLD_SIZE": "4"}, SLURM_STEP])
def test_fewer_workers_than_launched_are_an_error_with_the_command_that_works(connect, size, environment):
    words = rf"has started 4 workers, and Horovod has {size}: .*horovodrun -np 4 python train.py .*set {IGNORE}=1"
    with pytest.raises(ValueError, match=words):
        connect(size, environment)
    connect(size, {**environment, IGNORE: "1"})


def test_as_many_workers_as_launched_train_together(connect):
    for environment in ({"OMPI_COMM_WORLD_SIZE": "4"}, {"HOROVOD_SIZE": "4", "WORLD_SIZE": "8"}, SLURM_STEP):
        assert connect(4, environment).size() == 4
        assert connect(4, environment, process_set=2).size() == 2  # a part of them is meant
    assert connect(1, {}).size == 1


def test_without_initialization_the_advice_fits_the_launcher(connect):
    with pytest.raises(ValueError, match=r"one of 4 workers\. Call hvd_slowmo\.torch\.init\(\) or hvd\.init\(\) first"):
        connect(None, {"HOROVOD_SIZE": "4"})
    with pytest.raises(ValueError, match=r"torchrun or a launcher like it has started 4 workers"):
        connect(None, {"WORLD_SIZE": "4"})
    assert connect(None, {"WORLD_SIZE": "4", IGNORE: "1"}).size == 1
