"""torch.distributed as the core's `Comm`: gloo and NCCL, which come with PyTorch.

A process group matches collectives by their order, where Horovod matches them by name. Two things take the place of
names. Every optimizer has process groups of its own, so that its exchanges can't mix with others. And at the beginning
of each exchange the workers compare what they are about to start: gloo ends the process at messages of different
lengths, and takes any two of one length for the same. Whether a collective begins an exchange follows from those that
were started before, which are the same on all workers; what is still in flight is not.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from hvd_slowmo.comm.absence import absent_ranks
from hvd_slowmo.comm.failure import FailureLatch, absence
from hvd_slowmo.comm.in_turn import InTurn
from hvd_slowmo.comm.naming import family
from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo_torch.comm.beside import Beside
from hvd_slowmo_torch.comm.groups import GLOO_AND_NCCL, OpenGroups, own_group, timeout_of
from hvd_slowmo_torch.comm.host_staging import CudaCopies, Outbox, Sum
from hvd_slowmo_torch.comm.messages import shared
from hvd_slowmo_torch.comm.store_board import StoreBoard

T = TypeVar("T")

_PAUSE_S = 0.0002  # between two looks at a copy

_CONTINUES = {
    *(("ledger", kind) for kind in ("model", "mean")),
    *((first, second) for first in ("model", "mean") for second in ("model", "mean")),
    *(("gradient", kind) for kind in ("gradient", "present")),
    ("values", "values"),
}
"""Kinds of collectives of which the second belongs to the exchange of the first."""

_NAME_BYTES = 160  # of a collective in words, for an error


class Push(NamedTuple):
    """A message in flight, and the memory into which others' come."""

    name: str
    work: Any
    sent: torch.Tensor
    came: torch.Tensor
    length: int
    device: torch.device


class Bytes(NamedTuple):
    """Bytes in flight, the memory into which others' come, and their lengths by rank."""

    name: str
    work: Any
    sent: torch.Tensor
    came: list[torch.Tensor]
    lengths: list[int]
    device: torch.device


class DistributedComm:
    """Collectives of a process group that nobody else uses. After an error nothing more is submitted.

    Args:
        group: torch.distributed's, of this object's own.
        node: the workers of this one's node, for gradients="node".
        main: the same workers in the caller's thread, for exchanges beside it: what fails there fails here.
    """

    def __init__(self, group: Any, node: Comm | None = None, main: DistributedComm | None = None) -> None:
        self._group = group
        self._push_group: Any = None
        self._open: OpenGroups = OpenGroups(group) if main is None else main._open
        self._there: DistributedComm | None = None
        self._beside = Beside(take_turns=True)
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.ranks: Sequence[int] = tuple(dist.get_process_group_ranks(group))
        self.node = node
        self.family = family("torch.distributed", self.ranks)
        self.backend = "gloo" if "nccl" not in str(dist.get_backend_config(group)) else GLOO_AND_NCCL
        self.timeout = timeout_of(group)
        self._host_only = self.backend == "gloo"
        self._outbox = Outbox(self._submit, CudaCopies() if self._host_only else None)
        failures = None if main is None else main.failures
        self.failures: FailureLatch = failures or FailureLatch(
            "torch.distributed", dist.get_rank(), dist.DistNetworkError
        )
        self._in_flight: set[str] = set()  # names
        self._started: set[str] = set()  # names, since the last comparison
        self._kind = ""  # of the last one started
        self._history = 0  # digest of the collectives so far

    def start_sum(self, name: str, x: torch.Tensor) -> Sum:
        self._announce(name, f"sum {name} of {x.numel()} elements {x.dtype}")
        return self._outbox.put(name, x)

    def start_push(self, name: str, x: torch.Tensor, shares: Any) -> Push:
        self.failures.refuse_after_failure()
        if self._push_group is None:
            # Its own, because a push may stay in flight while the workers meet.
            self._push_group = self._open.add(own_group(self._group))
        weights, sources = shares[:, self.rank], shares[self.rank]
        sent = shared(x, weights)
        sent = sent.cpu() if self._host_only else sent
        splits = [[len(x) if share else 0 for share in each] for each in (sources, weights)]
        came = torch.empty(sum(splits[0]), dtype=x.dtype, device=sent.device)
        work = self._begin(self._push_group, dist.all_to_all_single, came, sent, *splits)
        return Push(name, work, sent, came, len(x), x.device)

    def start_alltoall(self, name: str, parts: Sequence[torch.Tensor]) -> Bytes:
        lengths = [len(part) for part in parts]
        self._announce(name, f"alltoall {name} of {lengths} bytes")
        sent = self._host(torch.cat(list(parts)))
        came = torch.empty(lengths[self.rank] * self.size, dtype=torch.uint8, device=sent.device)
        splits = [[lengths[self.rank]] * self.size, lengths]
        work = self._begin(self._group, dist.all_to_all_single, came, sent, *splits)
        return Bytes(name, work, sent, list(torch.split(came, splits[0])), splits[0], parts[0].device)

    def start_allgather(self, name: str, x: torch.Tensor, lengths: Sequence[int]) -> Bytes:
        self._announce(name, f"allgather {name} of {list(lengths)} bytes")
        longest = max(lengths)  # an allgather takes one length only
        sent = self._host(torch.nn.functional.pad(x, (0, longest - len(x))))
        came = [torch.empty_like(sent) for _ in lengths]
        work = self._begin(self._group, dist.all_gather, came, sent)
        return Bytes(name, work, sent, came, list(lengths), x.device)

    def _host(self, x: torch.Tensor) -> torch.Tensor:
        return x.cpu() if self._host_only else x

    def open_beside(self) -> None:
        if self._there is None:
            self._there = DistributedComm(self._open.add(own_group(self._group, host_only=True)), main=self)

    def start_beside(self, work: Callable[[Comm], T]) -> InTurn[T]:
        self.failures.refuse_after_failure()
        there = self._there
        assert there is not None, "open_beside() comes first"
        return self._beside.start(lambda: work(there))

    def _announce(self, name: str, what: str) -> None:
        """Note what is about to be started, and compare it with the others' where an exchange begins."""
        self.failures.refuse_after_failure()
        if name in self._in_flight:
            raise RuntimeError(
                f"{name} is in flight already: a step has failed in the middle of an exchange, and the other workers "
                "wait. End this process and resume from the last checkpoint."
            )
        while not self._outbox.empty and not what.startswith("sum"):  # what is matched by order must leave in order
            time.sleep(_PAUSE_S)
            self._outbox.advance()
        kind = kind_of(name)
        if name in self._started or (self._kind, kind) not in _CONTINUES:
            self._compare(what)
            self._started = set()
        self._kind = kind
        self._started.add(name)
        self._note(what)
        self._in_flight.add(name)

    def wait(self, handle: Sum | Push | Bytes | InTurn[Any]) -> Any:
        if isinstance(handle, InTurn):
            return handle.result()
        if isinstance(handle, Bytes):
            self._finish(handle.work, handle.name)
            self._in_flight.discard(handle.name)
            return [part[:length].to(handle.device) for part, length in zip(handle.came, handle.lengths, strict=True)]
        if isinstance(handle, Push):
            self._finish(handle.work, handle.name)
            came = handle.came.view(-1, handle.length)
            return (came[0] if len(came) == 1 else came.sum(dim=0)).to(handle.device)
        while handle.handle is None:  # its copy to host memory is in flight
            time.sleep(_PAUSE_S)
            self._outbox.advance()
        self._finish(handle.handle, handle.name)
        self._in_flight.discard(handle.name)
        return self._outbox.take(handle)

    def gather(self, name: str, item: Any) -> list[Any]:
        self.failures.refuse_after_failure()
        own = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)
        # Lengths differ, which an allgather can't have, and often one worker alone sends much.
        lengths = self._compare(f"gather {name}", len(own))
        self._kind, self._started = "gather", set()
        self._note(f"gather {name}")
        parts = [own if r == self.rank else torch.empty(n, dtype=torch.uint8) for r, n in enumerate(lengths)]
        works = [
            self._begin(self._group, dist.broadcast, part, src=source)
            for part, source in zip(parts, self.ranks, strict=True)
        ]
        for work in works:
            self._finish(work, name)
        return [pickle.loads(part.numpy().tobytes()) for part in parts]

    def _submit(self, name: str, x: torch.Tensor) -> Any:
        return self._begin(self._group, dist.all_reduce, x)

    def _note(self, what: str) -> None:
        self._history = _digest(f"{self._history} {what}")

    def _compare(self, what: str, length: int = 0) -> list[int]:
        """Compare with the other workers what comes next, and return everyone's `length`. A collective.

        Raises:
            ValueError: on every worker, if one is about to exchange something else, or has exchanged something else
                since the last comparison.
        """
        while not self._outbox.empty:
            time.sleep(_PAUSE_S)
            self._outbox.advance()
        table = torch.zeros(self.size, 3, dtype=torch.int64)
        table[self.rank] = torch.tensor([_digest(what), self._history, length])
        self._finish(self._begin(self._group, dist.all_reduce, table), what)
        if bool((table[:, :2] == table[0, :2]).all()):
            return [int(n) for n in table[:, 2]]
        texts = torch.zeros(self.size, _NAME_BYTES, dtype=torch.uint8)
        words = what.encode()[:_NAME_BYTES]
        texts[self.rank, : len(words)] = torch.frombuffer(bytearray(words), dtype=torch.uint8)
        self._finish(self._begin(self._group, dist.all_reduce, texts), what)
        self._history = 0
        spelt = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in texts.tolist()]
        if len(set(spelt)) == 1:
            raise ValueError(f"the workers have not exchanged the same before their {what}. Start the job anew.")
        places = "; ".join(f"rank {rank} is at its {text}" for rank, text in zip(self.ranks, spelt, strict=True))
        raise ValueError(
            f"the workers do not exchange the same: {places}. Construct optimizers, and call step(), join() and all "
            "other collectives, equally often and in the same order on every rank."
        )

    def _begin(self, group: Any, collective: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
        self.failures.refuse_after_failure()
        try:
            return collective(*tensors, group=group, async_op=True, **options)
        except (RuntimeError, ValueError) as error:  # ValueError: an error in another thread has closed the group
            if isinstance(error, ValueError) and not self.failures.failed:
                raise
            raise self._explained(error, collective.__name__) from error

    def _finish(self, work: Any, what: str) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._explained(error, what) from error

    def _explained(self, error: Exception, what: str) -> Exception:
        """Return the exception to raise in place of an error of a collective, which ends the exchange for all."""
        text = f"{what}: {str(error).splitlines()[0]}"
        with self._open.closing:
            if self.failures.failed:  # in another thread; this error follows from that one
                return self.failures.again()
            self._open.close()
            absent = absent_ranks(self.ranks, self.rank, StoreBoard())
            limit = self.timeout.total_seconds() if "imed out" in text else None
            return self.failures.lost(text, cause=absence(absent, limit))


def kind_of(name: str) -> str:
    """Return the kind of a collective by its name.

    Example:
        >>> kind_of("slowmo.model.12"), kind_of("slowmo.present")
        ('model', 'present')
    """
    *_, before, last = ["", *name.split(".")]
    return before if last.isdigit() else last


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
