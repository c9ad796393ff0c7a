"""Horovod as the core's `Comm`."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Sequence
from typing import Any

import torch

from hvd_slowmo.comm import Comm, SoloComm
from hvd_slowmo_torch.staging import CudaCopies, Outbox, Sum

# What launchers tell a worker about the number of its fellows: horovodrun with gloo, Open MPI, MPICH and Slurm's PMI.
_WORLD_SIZES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

# Between two looks at an unfinished collective. Horovod's own `synchronize` looks without a pause and takes the core
# that its communication thread, or another worker on a full machine, needs; see benchmarks/waiting.py.
_PAUSE_S = 0.0002


def connect(process_set: Any = None) -> Comm:
    """The workers to train with: Horovod's, those of a process set, or this process alone.

    Raises:
        ValueError: a launcher started several workers and `hvd.init()` was not called, or this worker is not a member
            of the process set.
        ImportError: several workers or a process set, and Horovod is not installed for PyTorch.
    """
    launched = max((int(os.environ.get(key) or 1) for key in _WORLD_SIZES), default=1)
    try:
        import horovod.torch as hvd
    except ImportError as error:
        if launched > 1 or process_set is not None:
            raise ImportError(
                f"several workers need Horovod with PyTorch support, and it cannot be imported ({error}). "
                "Run: hvd-slowmo install-horovod"
            ) from error
        return SoloComm()
    if not hvd.is_initialized():
        if launched > 1 or process_set is not None:
            raise ValueError(
                f"Horovod has not been initialized, and this is one of {launched} workers. Call hvd.init() first."
            )
        return SoloComm()
    members = hvd.global_process_set if process_set is None else process_set
    if not members.included():
        raise ValueError(
            f"rank {hvd.rank()} is not in the process set with ranks {members.ranks}. "
            "Construct SlowMo on the set's own ranks only."
        )
    return SoloComm() if members.size() == 1 else HorovodComm(members)


class HorovodComm:
    """Collectives of a Horovod process set. After Horovod's error nothing more is submitted."""

    def __init__(self, process_set: Any) -> None:
        import horovod.torch as hvd

        self._hvd = hvd
        self._set = process_set
        # Without NCCL, Horovod takes tensors in host memory only.
        self._outbox = Outbox(self._submit, None if hvd.nccl_built() else CudaCopies())
        self._broken: str | None = None
        self.rank: int = process_set.rank()
        self.size: int = process_set.size()
        self.ranks: Sequence[int] = tuple(process_set.ranks or range(self.size))

    def start_sum(self, name: str, x: torch.Tensor) -> Sum:
        self._refuse_if_broken()
        return self._outbox.put(name, x)

    def wait(self, handle: Sum) -> torch.Tensor:
        self._outbox.advance()
        while handle.handle is None:  # its copy to host memory is under way
            time.sleep(_PAUSE_S)
            self._outbox.advance()
        self._finish(handle.handle)
        return self._outbox.take(handle)

    def _submit(self, name: str, x: torch.Tensor) -> Any:
        self._refuse_if_broken()
        return self._hvd.allreduce_async_(x, op=self._hvd.Sum, name=name, process_set=self._set)

    def gather(self, name: str, item: Any) -> list[Any]:
        self._refuse_if_broken()
        sent = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)
        length = torch.tensor([len(sent)], dtype=torch.int64)
        lengths = self._finish(self._hvd.allgather_async(length, name=f"{name}.length", process_set=self._set))
        everything = self._finish(self._hvd.allgather_async(sent, name=name, process_set=self._set))
        return [pickle.loads(part.numpy().tobytes()) for part in torch.split(everything, lengths.tolist())]

    def _finish(self, pending: int) -> torch.Tensor:
        from horovod.common.exceptions import HorovodInternalError

        try:
            while not self._hvd.poll(pending):
                self._outbox.advance()
                time.sleep(_PAUSE_S)
            return self._hvd.synchronize(pending)  # type: ignore[no-any-return]
        except HorovodInternalError as error:
            if "Mismatched" in str(error):
                raise ValueError(f"the workers do not exchange the same: {error}") from error
            # Submitting anything after this error can freeze the process, even while it ends (docs/architecture.md).
            self._broken = str(error)
            raise HorovodInternalError(
                f"rank {self._hvd.rank()}: a collective failed, most likely because another worker ended or was "
                f"killed; look at that worker's output. Horovod says: {error}"
            ) from error

    def _refuse_if_broken(self) -> None:
        if self._broken is not None:
            raise RuntimeError(
                f"nothing more can be exchanged after Horovod's error ({self._broken}). End this process; the job can "
                "be resumed from its last checkpoint."
            )
