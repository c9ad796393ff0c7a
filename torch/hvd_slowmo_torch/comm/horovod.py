"""Horovod as the core's `Comm`."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from hvd_slowmo.comm.horovod import HorovodFailures
from hvd_slowmo.comm.in_turn import InTurn
from hvd_slowmo.comm.naming import family
from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo_torch.comm.beside import Beside
from hvd_slowmo_torch.comm.host_staging import CudaCopies, Outbox, Sum
from hvd_slowmo_torch.comm.messages import shared

# Between two looks at an unfinished collective. Horovod's own `synchronize` looks without a pause and takes the core
# that its communication thread, or another worker on a full machine, needs; see benchmarks/waiting.py.
_PAUSE_S = 0.0002

T = TypeVar("T")


class Push(NamedTuple):
    """A message in flight; the results are messages received."""

    name: str
    handle: int
    length: int
    device: torch.device


class Bytes(NamedTuple):
    """Bytes in flight, and the lengths of those that come, by rank."""

    name: str
    handle: int
    lengths: list[int]
    device: torch.device


class HorovodComm:
    """Collectives of a Horovod process set. After Horovod's error nothing more is submitted.

    Args:
        process_set: Horovod's.
        node: the workers of this one's node, for gradients="node".
        failures: those of the same workers in another thread.
    """

    def __init__(self, process_set: Any, node: Comm | None, failures: HorovodFailures | None = None) -> None:
        import horovod.torch as hvd

        self._hvd = hvd
        self._set = process_set
        # Without NCCL, Horovod takes tensors in host memory only.
        self._host_only = not hvd.nccl_built()
        self._outbox = Outbox(self._submit, CudaCopies() if self._host_only else None)
        self.rank: int = process_set.rank()
        self.size: int = process_set.size()
        self.ranks: Sequence[int] = tuple(process_set.ranks or range(self.size))
        self.node = node
        self.family = family("horovod", self.ranks)
        self.failures = failures or HorovodFailures(hvd.rank(), self.ranks)
        self._beside = Beside(take_turns=False)  # Horovod matches collectives by name

    def start_sum(self, name: str, x: torch.Tensor) -> Sum:
        self.failures.refuse_after_failure()
        return self._outbox.put(name, x)

    def start_push(self, name: str, x: torch.Tensor, shares: Any) -> Push:
        self.failures.refuse_after_failure()
        weights = shares[:, self.rank]
        # Horovod has no send and receive; an alltoall with nothing for most workers puts no more on the wire.
        sent = shared(x, weights)
        splits = torch.tensor([len(x) if weight else 0 for weight in weights], dtype=torch.int32)
        if self._host_only:
            sent = sent.cpu()
        handle = self._begun(self._hvd.alltoall_async, sent, splits, name=name)
        return Push(name, handle, len(x), x.device)

    def start_alltoall(self, name: str, parts: Sequence[torch.Tensor]) -> Bytes:
        self.failures.refuse_after_failure()
        splits = torch.tensor([len(part) for part in parts], dtype=torch.int32)
        handle = self._begun(self._hvd.alltoall_async, self._host(torch.cat(list(parts))), splits, name=name)
        return Bytes(name, handle, [len(parts[self.rank])] * self.size, parts[0].device)

    def start_allgather(self, name: str, x: torch.Tensor, lengths: Sequence[int]) -> Bytes:
        self.failures.refuse_after_failure()
        handle = self._begun(self._hvd.allgather_async, self._host(x), name=name)
        return Bytes(name, handle, list(lengths), x.device)

    def _host(self, x: torch.Tensor) -> torch.Tensor:
        return x.cpu() if self._host_only else x

    def open_beside(self) -> None:
        """Do nothing: the names of an exchange's collectives are its own."""

    def start_beside(self, work: Callable[[Comm], T]) -> InTurn[T]:
        self.failures.refuse_after_failure()
        there = HorovodComm(self._set, None, self.failures)
        return self._beside.start(lambda: work(there))

    def wait(self, handle: Sum | Push | Bytes | InTurn[Any]) -> Any:
        if isinstance(handle, InTurn):
            return handle.result()
        if isinstance(handle, Bytes):
            found = self._finish(handle.handle, handle.name)
            whole = found[0] if isinstance(found, (tuple, list)) else found  # an alltoall tells the lengths too
            return list(torch.split(whole.to(handle.device), handle.lengths))
        if isinstance(handle, Push):
            came: torch.Tensor = self._finish(handle.handle, handle.name)[0].view(-1, handle.length)
            return (came[0] if len(came) == 1 else came.sum(dim=0)).to(handle.device)
        self._outbox.advance()
        while handle.handle is None:  # its copy to host memory is in flight
            time.sleep(_PAUSE_S)
            self._outbox.advance()
        self._finish(handle.handle, handle.name)
        return self._outbox.take(handle)

    def _submit(self, name: str, x: torch.Tensor) -> Any:
        self.failures.refuse_after_failure()
        return self._begun(self._hvd.allreduce_async_, x, op=self._hvd.Sum, name=name)

    def gather(self, name: str, item: Any) -> list[Any]:
        self.failures.refuse_after_failure()
        sent = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)
        length = torch.tensor([len(sent)], dtype=torch.int64)
        lengths = self._finish(self._begun(self._hvd.allgather_async, length, name=f"{name}.length"), name)
        everything = self._finish(self._begun(self._hvd.allgather_async, sent, name=name), name)
        return [pickle.loads(part.numpy().tobytes()) for part in torch.split(everything, lengths.tolist())]

    def _begun(self, begin: Callable[..., int], *tensors: torch.Tensor, **options: Any) -> int:
        """Start a collective and return its handle. Horovod may have noticed already that another worker is gone."""
        from horovod.common.exceptions import HorovodInternalError

        try:
            return begin(*tensors, **options, process_set=self._set)
        except HorovodInternalError as error:
            raise self.failures.explain(error, options.get("name")) from error

    def _finish(self, pending: int, name: str) -> Any:
        from horovod.common.exceptions import HorovodInternalError

        try:
            while not self._hvd.poll(pending):
                self._outbox.advance()
                time.sleep(_PAUSE_S)
            return self._hvd.synchronize(pending)
        except HorovodInternalError as error:
            raise self.failures.explain(error, name) from error
