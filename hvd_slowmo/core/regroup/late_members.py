"""Late exchanges when the workers come together: some have applied one that others have not, and some have none.

The exchanges of a fragment have numbers; a worker has launched so many and applied so many, and one is in flight where
these differ. A worker applies an exchange only once all have launched it, or meet in a join, which counts as both at
once. So survivors are at most one apart:

    applied by some     the others take anchor and v from one of them, and keep what they have trained since they sent
    launched by some    the others launch it now, with the steps that they have: they count as slower workers do
    in flight           sent again by all, from the values that were set aside; dropped where nobody has a part in it

All that others give arrives before anything of it is applied, so that a second loss finds a worker before or after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.average.broadcast import take_chunks
from hvd_slowmo.core.parts.progress import Progress, Vector
from hvd_slowmo.core.parts.schedule import meetings_so_far
from hvd_slowmo.core.step.machine import Machine


class LateWorker(NamedTuple):
    """A worker in whose place others look when they come together."""

    progress: Progress
    stays: bool  # it keeps its parameters and its part of the blocks
    torn: bool = False  # another loss has left it with parts of others' anchor and v


class Flying(NamedTuple):
    """The exchanges that are in flight on all workers from now on, by fragment."""

    launched: tuple[int, ...]  # number of steps after which it was launched; 0: there is none
    giver: tuple[int, ...]  # rank of a worker that has applied all that anybody has
    lack: tuple[tuple[int, ...], ...]  # ranks of those that have not
    take: tuple[tuple[int, ...], ...]  # ranks of those that need its anchor and v
    weights: tuple[tuple[int, ...], ...]  # by rank, steps in the exchange that comes next; of those that lack one none


def applied(config: SlowMoConfig, step: int, launched: Sequence[int]) -> tuple[int, ...]:
    """Return how many exchanges of each fragment a worker has applied.

    Args:
        step: inner steps counted.
        launched: by fragment, the step of the exchange in flight, 0 if there is none.

    Example:
        >>> applied(SlowMoConfig(tau=4, fragments=2, delay=1), 6, (6, 0))
        (1, 1)
    """
    begun = meetings_so_far(config, step)[: len(launched)]
    return tuple(number - (flying > 0) for number, flying in zip(begun, launched, strict=True))


def in_flight_together(config: SlowMoConfig, workers: Sequence[LateWorker], leader: int) -> Flying:
    """Return what is in flight on all workers that stay, once the others have caught up with each other.

    Args:
        workers: by rank; those that do not stay start where the leader is.
    """
    staying = [rank for rank, worker in enumerate(workers) if worker.stays]
    done = {
        rank: applied(config, int(workers[rank].progress.step), workers[rank].progress.flight.launched.tolist())
        for rank in staying
    }
    flight = workers[leader].progress.flight
    launched, giver, lack, take, weights = [], [], [], [], []
    for fragment, begun in enumerate(flight.launched.tolist()):
        most = max(done[rank][fragment] for rank in staying)
        lacking = tuple(rank for rank in staying if done[rank][fragment] < most)
        parts = [_part(workers[rank].progress, fragment, rank in lacking) for rank in staying]
        launched.append(begun if leader not in lacking and any(parts) else 0)
        gives = min((rank for rank in staying if rank not in lacking), key=lambda rank: (workers[rank].torn, rank))
        giver.append(gives)
        lack.append(lacking)
        take.append(tuple(rank for rank in staying if rank in lacking or (workers[rank].torn and rank != gives)))
        kept = {rank: part for rank, part in zip(staying, parts, strict=True) if rank not in lacking}
        weights.append(tuple(kept.get(rank, 0) for rank in range(len(workers))))
    return Flying(tuple(launched), tuple(giver), tuple(lack), tuple(take), tuple(weights))


def _part(progress: Progress, fragment: int, lacks: bool) -> int:
    """Return the steps by which a worker weighs in the exchange in flight, or will when it launches it."""
    flight = progress.flight
    launched = flight.launched[fragment] > 0 and not lacks
    return int(flight.sent_since[fragment] if launched else progress.since[fragment])


def launch_unlaunched(machine: Machine, progress: Progress, flying: Flying, rank: int) -> Progress:
    """Return the state of a worker that has launched each exchange whose result it lacks.

    Others may have such a result from a join, where workers meet without a launch. Nobody must see this state before
    the result is there: its number of launches would be wrong.
    """
    for fragment, lack in enumerate(flying.lack):
        if rank in lack and not progress.flight.launched[fragment]:
            progress, _ = machine.flights.set_aside(progress, fragment)
    return progress


def take_applied(machine: Machine, flying: Flying, rank: int) -> None:
    """Take anchor and v of the exchanges that another worker has applied. A collective of all workers.

    Those that are kept in slices come when these are dealt anew.
    """
    runtime, keeps = machine.runtime, machine.runtime.slices.keeps
    vectors = [name for name in ("anchor", "v") if name in machine.config.vectors]
    for fragment, (giver, take) in enumerate(zip(flying.giver, flying.take, strict=True)):
        for chunk in machine.layout.of_fragment(fragment) if take else ():
            for vector in vectors if chunk.role == "parameter" else ():
                if not keeps(vector, chunk.index):
                    take_chunks(runtime, giver, [chunk], vector, takes=rank in take)


def catch_up(
    machine: Machine,
    progress: Progress,
    flying: Flying,
    rank: int,
    workers: Sequence[LateWorker],
    arrived: Mapping[int, Any],
) -> Progress:
    """Return the state of a worker that stays once it has applied, launched or dropped what the others have.

    Args:
        progress: with all inner steps counted; `take_applied` has brought the vectors.
        arrived: by chunk, the model's new values where no worker keeps the anchor whole.
    """
    store, flights = machine.runtime.store, machine.flights
    progress = launch_unlaunched(machine, progress, flying, rank)
    for fragment, launched in enumerate(flying.launched):
        if rank in flying.lack[fragment]:
            for chunk in machine.layout.of_fragment(fragment):
                if chunk.role == "parameter" and "residual" in machine.config.vectors:
                    store.write("residual", chunk, store.read("residual", chunk) * 0)  # the result has it already
            progress = flights.overtake(progress, fragment, _gamma(workers, flying, fragment), arrived)
        if launched and not progress.flight.launched[fragment]:
            progress, _ = flights.set_aside(progress, fragment)
        elif progress.flight.launched[fragment] and not launched:
            progress = flights.landed(progress, fragment)
    return _launched_together(progress, flying)


def state_of_leader(workers: Sequence[LateWorker], leader: int, flying: Flying) -> Progress:
    """Return the leader's state once it has caught up, for those who start where it is."""
    progress = workers[leader].progress
    gamma = progress.gamma.copy()
    for fragment in range(len(flying.launched)):
        gamma[fragment] = _gamma(workers, flying, fragment)
    return _launched_together(progress._replace(gamma=gamma), flying)


def give_in_flight(machine: Machine, leader: int, former: Vector, launched: Sequence[int], takes: bool) -> None:
    """Give the leader's values in flight to workers that start with all of its state. A collective of all workers.

    Args:
        former: `launched` of this worker before.
        launched: the leader's.
    """
    if takes:
        set_aside_anew(machine, former, launched)
    for fragment, flying in enumerate(launched):
        chunks = machine.layout.of_fragment(fragment) if flying else ()
        take_chunks(machine.runtime, leader, list(chunks), "in_flight", takes)


def set_aside_anew(machine: Machine, former: Vector, launched: Sequence[int]) -> None:
    """Let a worker that starts where the leader is have its present values in flight.

    Args:
        former: `launched` of this worker before.
        launched: the leader's.
    """
    store = machine.runtime.store
    for fragment, flying in enumerate(launched):
        for chunk in machine.layout.of_fragment(fragment):
            if former[fragment]:
                store.drop(chunk)
            if flying:
                store.set_aside(chunk)


def _gamma(workers: Sequence[LateWorker], flying: Flying, fragment: int) -> Vector:
    return workers[flying.giver[fragment]].progress.gamma[fragment]


def _launched_together(progress: Progress, flying: Flying) -> Progress:
    launched = np.array(flying.launched, np.int64)
    return progress._replace(flight=progress.flight._replace(launched=launched))
