"""Horovod as the core's `Comm`."""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from typing import Any

import torch

from hvd_slowmo.workers import Link, Workers
from hvd_slowmo_torch.staging import CudaCopies, Outbox, Sum

# Between two looks at an unfinished collective. Horovod's own `synchronize` looks without a pause and takes the core
# that its communication thread, or another worker on a full machine, needs; see benchmarks/waiting.py.
_PAUSE_S = 0.0002


class HorovodComm:
    """Collectives of a Horovod process set. After Horovod's error nothing more is submitted."""

    def __init__(self, process_set: Any) -> None:
        import horovod.torch as hvd

        self._hvd = hvd
        self._set = process_set
        # Without NCCL, Horovod takes tensors in host memory only.
        self._outbox = Outbox(self._submit, None if hvd.nccl_built() else CudaCopies())
        self.rank: int = process_set.rank()
        self.size: int = process_set.size()
        self.ranks: Sequence[int] = tuple(process_set.ranks or range(self.size))
        self._link = Link(hvd.rank())

    def start_sum(self, name: str, x: torch.Tensor) -> Sum:
        self._link.refuse_if_broken()
        return self._outbox.put(name, x)

    def wait(self, handle: Sum) -> torch.Tensor:
        self._outbox.advance()
        while handle.handle is None:  # its copy to host memory is under way
            time.sleep(_PAUSE_S)
            self._outbox.advance()
        self._finish(handle.handle)
        return self._outbox.take(handle)

    def _submit(self, name: str, x: torch.Tensor) -> Any:
        self._link.refuse_if_broken()
        return self._hvd.allreduce_async_(x, op=self._hvd.Sum, name=name, process_set=self._set)

    def gather(self, name: str, item: Any) -> list[Any]:
        self._link.refuse_if_broken()
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
            raise self._link.explain(error) from error


workers = Workers("horovod.torch", "PyTorch", "hvd_slowmo.torch", HorovodComm)
