"""Threads as workers: many workers in one process, stricter than Horovod."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hvd_slowmo.comm.in_turn import InTurn
from hvd_slowmo.comm.protocol import Comm

T = TypeVar("T")


class WorldError(RuntimeError):
    """The workers of a ThreadWorld did not do the same, or one of them failed; raised on every worker."""


class ThreadWorld:
    """m workers as threads of one process.

    Stricter than Horovod: every worker must start the same collectives in the same order, with the same names, shapes
    and types. The first difference, a worker that fails and a worker that ends while others wait all raise WorldError
    on every worker that takes part in a collective from then on: nothing ever hangs.

    Args:
        size: number of workers, m >= 1.
        node_size: number of workers per node, for gradients="node"; None: there are no nodes.

    Raises:
        ValueError: `size` is no positive integer, or `node_size` does not divide it.

    Example:
        >>> ThreadWorld(3).run(lambda comm: comm.gather("ranks", comm.rank))
        [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """

    def __init__(self, size: int, node_size: int | None = None) -> None:
        if size < 1:
            raise ValueError(f"`size` must be a positive integer. Received: size={size!r}")
        if node_size is not None and (node_size < 1 or size % node_size):
            raise ValueError(f"`node_size` must divide `size`. Received: size={size!r}, node_size={node_size!r}")
        self.size = size
        self._node_size = node_size
        self._nodes = [] if node_size is None else [ThreadWorld(node_size) for _ in range(size // node_size)]
        self._beside: ThreadWorld | None = None  # of exchanges beside the workers' threads, once there is one
        self._last_beside: dict[int, InTurn[Any]] = {}  # by rank
        self._changed = threading.Condition()
        self._rounds: dict[int, dict[int, tuple[tuple[Any, ...], Any]]] = {}  # number of the collective -> by rank
        self._taken: dict[int, int] = {}  # how many workers have read a round's result
        self._counts = [0] * size  # collectives that each worker has started
        self._ended: dict[int, str] = {}
        self._failure: str | None = None

    def run(self, work: Callable[[Comm], T], *, return_exceptions: bool = False) -> list[T | BaseException]:
        """Call work(comm) on every worker at once, and return the results by rank.

        Raises:
            Exception: the first error, unless return_exceptions=True: then errors stand in their worker's place.
        """
        results: list[Any] = [None] * self.size
        errors: list[tuple[int, BaseException]] = []

        def worker(rank: int) -> None:
            ending = "ended"
            try:
                results[rank] = work(self.member(rank))
            except BaseException as error:  # whatever a worker's code raises must reach the caller, not a thread's log
                results[rank] = error
                errors.append((rank, error))
                ending = f"failed with {type(error).__name__}: {error}"
            self.end(rank, ending)

        threads = [threading.Thread(target=worker, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors and not return_exceptions:
            raise errors[0][1]
        return results

    def member(self, rank: int) -> Comm:
        """Return the Comm of one worker."""
        if self._node_size is None:
            return _ThreadComm(self, rank, None)
        node, place = divmod(rank, self._node_size)
        return _ThreadComm(self, rank, _ThreadComm(self._nodes[node], place, None))

    def start_beside(self, rank: int, work: Callable[[Comm], T]) -> InTurn[T]:
        """Start a worker's next exchange in a thread of its own: they take turns, in the order of their starts."""
        with self._changed:
            if self._beside is None:
                self._beside = ThreadWorld(self.size)
                for ended, ending in self._ended.items():
                    self._beside.end(ended, ending)
            comm = self._beside.member(rank)
            started = InTurn(lambda: work(comm), self._last_beside.get(rank))
            self._last_beside[rank] = started
            return started

    def end(self, rank: int, ending: str) -> None:
        """Note that a worker has ended: those that wait for it, or will, raise WorldError."""
        with self._changed:
            self._ended[rank] = ending
            self._changed.notify_all()
            beside, last = self._beside, self._last_beside.get(rank)
        if beside is not None:
            # Its exchanges may be under way: the others are done with them before it has ended there.
            threading.Thread(target=beside._end_after, args=(last, rank, ending), daemon=True).start()
        if self._node_size is not None:
            node, place = divmod(rank, self._node_size)
            self._nodes[node].end(place, ending)

    def _end_after(self, last: InTurn[Any] | None, rank: int, ending: str) -> None:
        if last is not None:
            last.join()
        self.end(rank, ending)

    def submit(self, rank: int, signature: tuple[Any, ...], item: Any) -> int:
        """Enter a worker's next collective, and return its number."""
        with self._changed:
            number = self._counts[rank]
            self._counts[rank] += 1
            entries = self._rounds.setdefault(number, {})
            for other, (expected, _) in sorted(entries.items()):
                if signature != expected and self._failure is None:
                    (a, its), (b, theirs) = sorted([(other, expected), (rank, signature)])
                    self._failure = f"collective {number}: rank {a} started {_spell(its)}, rank {b} {_spell(theirs)}"
            entries[rank] = (signature, item)
            self._changed.notify_all()
            return number

    def collect(self, number: int) -> list[Any]:
        """Return all workers' items of a collective, by rank, once all have come."""
        with self._changed:
            entries = self._rounds[number]

            def over() -> bool:
                return bool(self._failure) or len(entries) == self.size or any(r not in entries for r in self._ended)

            self._changed.wait_for(over)
            if self._failure is None and len(entries) < self.size:
                rank = next(r for r in sorted(self._ended) if r not in entries)
                name = next(iter(entries.values()))[0]
                self._failure = f"rank {rank} {self._ended[rank]} while others wait in {_spell(name)}"
                self._changed.notify_all()
            if self._failure is not None:
                raise WorldError(self._failure)
            self._taken[number] = self._taken.get(number, 0) + 1
            if self._taken[number] == self.size:
                del self._rounds[number], self._taken[number]
            return [entries[rank][1] for rank in range(self.size)]


_ALLTOALL, _ALLGATHER = object(), object()  # kinds of collectives, in the place of the tensor that takes a sum


def _spell(signature: tuple[Any, ...]) -> str:
    return " ".join(str(part) for part in signature)


class _ThreadComm:
    """One worker's end of a ThreadWorld."""

    def __init__(self, world: ThreadWorld, rank: int, node: Comm | None) -> None:
        self._world = world
        self.rank = rank
        self.node = node
        self.size = world.size
        self.ranks = range(world.size)

    def start_sum(self, name: str, x: Any) -> tuple[int, Any]:
        # A copy, as on a network: a worker that writes to x too early must not change what the others see.
        return self._world.submit(self.rank, ("sum", repr(name), tuple(x.shape), str(x.dtype)), x + 0), x

    def start_alltoall(self, name: str, parts: Sequence[Any]) -> tuple[int, Any]:
        lengths = tuple(len(part) for part in parts)
        sent = [part * 1 for part in parts]
        return self._world.submit(self.rank, ("alltoall", repr(name), lengths), sent), _ALLTOALL

    def start_allgather(self, name: str, x: Any, lengths: Sequence[int]) -> tuple[int, Any]:
        assert lengths[self.rank] == len(x), "its own length too"
        return self._world.submit(self.rank, ("allgather", repr(name), tuple(lengths)), x * 1), _ALLGATHER

    def start_push(self, name: str, x: Any, shares: Any) -> tuple[int, Any]:
        sent = [x * float(weight) if weight else None for weight in shares[:, self.rank]]
        return self._world.submit(self.rank, ("push", repr(name), tuple(x.shape), str(x.dtype)), (sent, x * 0)), None

    def open_beside(self) -> None:
        """Do nothing: the world makes room for them when the first one starts."""

    def start_beside(self, work: Callable[[Comm], T]) -> InTurn[T]:
        return self._world.start_beside(self.rank, work)

    def wait(self, handle: tuple[int, Any] | InTurn[Any]) -> Any:
        if isinstance(handle, InTurn):
            return handle.result()
        number, x = handle
        parts = self._world.collect(number)
        if x is _ALLTOALL:
            return [sent[self.rank] for sent in parts]
        if x is _ALLGATHER:
            return parts
        if x is None:  # what each worker has sent to this one
            came = [sent[self.rank] for sent, _ in parts if sent[self.rank] is not None]
            return sum(came, start=parts[self.rank][1])
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        x[...] = total  # in place, as Horovod's: who uses the memory of x too early must be found out
        return x

    def gather(self, name: str, item: Any) -> list[Any]:
        # As bytes, as on a network: what a worker does to its item later must not reach the others.
        number = self._world.submit(self.rank, ("gather", repr(name)), pickle.dumps(item))
        return [pickle.loads(sent) for sent in self._world.collect(number)]
