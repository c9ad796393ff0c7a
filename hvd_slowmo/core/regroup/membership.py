"""Coming together again after workers were lost, or with new ones: one sequence of collectives for every framework.

members → digest → graph → progress → handed-out state → chunks → mean of what gossips → the interrupted step

All workers that go on have made the same blocks, or are brought there by the one that is ahead, the leader. A
survivor that is in the leader's block keeps its parameters and its part of the block, wherever the loss has caught
it: what the leader has written of an outer step that was broken off is handed to those that have not, and the rest of
the outer step is taken again. Where all of them have answered it from their joins, no worker is left that made this
step: what some have written is handed to all, and the rest is not taken. A newcomer, and a survivor whose last block
is over elsewhere, starts from the anchor with no steps of its own. Between gossiping workers no mass of a lost one is
kept: one mean of the parameters that the models show leaves all weights at 1 and nothing in flight.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.average.broadcast import average_chunks, take_chunks, values_of
from hvd_slowmo.core.parts.layout import Chunk, Ref
from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.core.parts.schedule import meetings_so_far
from hvd_slowmo.core.regroup.dealing import FormerSlices, Owner
from hvd_slowmo.core.regroup.late_members import (
    LateWorker,
    applied,
    catch_up,
    give_in_flight,
    in_flight_together,
    launch_unlaunched,
    set_aside_anew,
    state_of_leader,
    take_applied,
)
from hvd_slowmo.core.regroup.sliced_members import SlicedWorker, deal_slices
from hvd_slowmo.core.start.graph import Graph, agreed_graph
from hvd_slowmo.core.start.startup import (
    Description,
    Job,
    StartingWorker,
    agree,
    common_groups,
    hand_out,
    regrouped,
    start,
)
from hvd_slowmo.core.step.machine import Machine

R = TypeVar("R", bound=Ref)

logger = logging.getLogger("hvd_slowmo")


class Place(NamedTuple):
    """A worker's message to the others when they come together."""

    started: bool = False  # it has a state
    step: int = 0  # inner steps counted
    interrupted: bool = False  # it has made the next one too, and the exchange behind it was broken off
    written: tuple[int, ...] = ()  # numbers of the chunks that it has written of that exchange
    launched: tuple[int, ...] = ()  # `Flight.launched` of its state
    owner: Owner | None = None  # whose slices it has, of vectors of which each worker keeps its own slice alone
    torn: bool = False  # others were lost while it took their state: it has parts of two
    framework: str = ""
    answers: bool = False  # the exchange that was broken off is one that it has answered, from its join say

    def ahead(self, config: SlowMoConfig) -> tuple[bool, bool, int, int, bool, int]:
        """Return something that is greater for a worker that is further."""
        done = sum(_applied(config, self))
        # Without an anchor nobody can be given what has been applied, so that it decides.
        first = 0 if config.vectors else done
        return self.started, not _spoiled(config, self), first, self.step, self.interrupted, done


class Member(StartingWorker[R], Protocol):
    """An adapter's part.

    Attributes:
        torn: it is taking the others' state, of which it may have parts; see `Place`.
        answered: steps at which it has answered an exchange whose step it had not made; None where that is over.
    """

    torn: bool
    answered: int | None

    @property
    def machine(self) -> Machine:
        """The state machine, of the workers that were assembled last."""

    def place(self) -> Place:
        """Return where this worker is."""

    def reassemble(self, description: Description[R], graph: Graph | None) -> None:
        """Make everything that a step needs with the present workers; model, vectors and position stay."""

    def former_slices(self) -> FormerSlices | None:
        """Return what this worker has kept in slices so far; None if there is nothing."""

    def forget_former_slices(self) -> None:
        """Free them: they have been dealt anew."""

    def read_progress(self) -> Progress:
        """Return the scalar state."""

    def write_progress(self, progress: Progress, interrupted: bool = False) -> None:
        """Replace the scalar state, and whether an inner step beyond it has been made."""

    def count_step(self) -> None:
        """Count an inner step that has been made, and whose exchange was broken off, without what follows it."""

    def finish_step(self) -> None:
        """Count an inner step that nobody has counted yet, and run the exchange that was broken off after it."""


class Reformed(NamedTuple):
    """The outcome, the same on all workers.

    Attributes:
        order: all ranks, first those that are further; see `leader`.
        newcomers: ranks without a state before.
        behind: ranks whose last block was over elsewhere; their steps since then are lost.
        job: the workers.
    """

    job: Job
    order: tuple[int, ...]
    newcomers: tuple[int, ...]
    behind: tuple[int, ...]

    @property
    def leader(self) -> int:
        """Rank of the worker from which newcomers have their state."""
        return self.order[0]


def come_together(member: Member[R], comm: ScopedComm) -> Reformed:
    """Bring survivors and new workers to one place. A collective of all of them.

    Raises:
        TypeError, ValueError: on every worker, if settings or models differ, or a setting can't be used here.
    """
    # Under the common prefix: names have not been compared yet.
    places = [Place(*each) for each in comm.handshake.gather("members", tuple(member.place()))]
    if not any(place.started for place in places):
        return Reformed(start(member, comm), tuple(range(comm.size)), (), ())
    config, own = member.config, places[comm.rank]
    description = agree(member, comm)
    groups = description.groups
    if member.parameter_map is not None:
        groups = common_groups([groups.of] * comm.size, comm.rank)
        description = regrouped(description, groups)
    order = tuple(sorted(range(comm.size), key=lambda rank: (*places[rank].ahead(config), -rank), reverse=True))
    leader, lead = order[0], places[order[0]]
    copies = _equal(config, lead.step)
    within = [in_block_of(config, place, lead) for place in places]
    stays = [rank == leader or (each and not copies) for rank, each in enumerate(within)]
    member.reassemble(description, agreed_graph(config, comm))
    if config.delay:
        comm.open_beside()
    machine = member.machine
    late = config.delay > 0 and not copies
    tells = comm.rank == leader or (late and own.started)
    told = comm.gather("progress", (_plain(member.read_progress()) if tells else None, _finite(member)))
    everyone, finite = zip(*told, strict=True)
    job = Job(tuple(place.framework for place in places), (lead.step,) * comm.size, groups)
    takes = [not place.started or (copies and rank != leader) for rank, place in enumerate(places)]
    if any(takes):
        hand_out(member, comm, job, order, takes)
    progress = Progress.from_flat(everyone[leader])
    written: set[int] | None = None
    flying, workers = None, []
    if late:
        states = [machine.initial() if each is None else Progress.from_flat(each) for each in everyone]
        seen = zip(states, stays, places, strict=True)
        workers = [LateWorker(state, stay, place.torn) for state, stay, place in seen]
        flying = in_flight_together(config, workers, leader)
        progress = state_of_leader(workers, leader, flying)
        member.torn = own.torn or any(comm.rank in take for take in flying.take)
        take_applied(machine, flying, comm.rank)
    elif lead.interrupted or _all_answer(places, stays):
        written = _roll_forward(member, places, stays, comm.rank)
        if not lead.interrupted:  # nobody forgets what has been written before all have it
            comm.gather("written", None)
    arrived: dict[int, Any] = {}
    if config.sliced_vectors:
        sliced = _sliced_workers(machine, places, lead, within, stays, finite)
        member.torn = member.torn or not stays[comm.rank]
        former = member.former_slices() if sliced[comm.rank].owner is not None else None
        present = member.read_progress()
        if flying is not None:
            present = launch_unlaunched(machine, present, flying, comm.rank)
        arrived = deal_slices(machine, former, present, sliced, flying, written)
        member.forget_former_slices()
    together = stays[comm.rank] and _at_step_of(own, lead)
    if flying is not None and stays[comm.rank]:  # at once: what follows may be broken off too
        if own.interrupted and not together:
            member.count_step()
        caught_up = catch_up(machine, member.read_progress(), flying, comm.rank, workers, arrived)
        member.write_progress(caught_up._replace(step=lead.step), together)
        member.torn = False
    if not all(stays):
        _start_at(member, leader, progress, lead, not stays[comm.rank])
    if stays[comm.rank] and not late:
        if own.interrupted and not together:
            member.count_step()
        member.write_progress(member.read_progress()._replace(step=lead.step), together)
    if config.gossip is not None and not copies:
        average_chunks(machine.runtime, _unwritten(machine, written), stays)
        machine.runtime.store.settle()
    member.torn = False
    machine.written = written if lead.interrupted else None  # else no worker is left that has made this step
    if lead.interrupted and not (copies or together):
        member.answered = lead.step  # as in a join: the others make this step
    if lead.interrupted and (copies or together):
        member.finish_step()
    elif lead.interrupted and (late or config.gossip is not None):
        member.write_progress(machine.pass_step(member.read_progress()))
    elif lead.interrupted:
        followed, _, _ = machine.follow(member.read_progress())
        member.write_progress(followed)
    machine.flights.resume(member.read_progress())
    newcomers = tuple(rank for rank, place in enumerate(places) if not place.started)
    behind = tuple(rank for rank, place in enumerate(places) if place.started and not (within[rank] or rank == leader))
    if comm.rank == leader:
        logger.info(
            "%s: %d workers go on at step %d; %d are new, %d had to skip a block",
            comm.name,
            comm.size,
            lead.step + lead.interrupted,
            len(newcomers),
            len(behind),
        )
    return Reformed(job, order, newcomers, behind)


def in_block_of(config: SlowMoConfig, place: Place, lead: Place) -> bool:
    """Return whether a worker is in the leader's block, so that its part of it counts.

    With late exchanges it can be brought there from any block: see `hvd_slowmo.core.regroup.late_members`.

    Example:
        >>> config = SlowMoConfig(tau=4)
        >>> in_block_of(config, Place(True, 5), Place(True, 7)), in_block_of(config, Place(True, 5), Place(True, 8))
        (True, False)
    """
    if not place.started or _spoiled(config, place):
        return False
    if _equal(config, lead.step):
        return (place.step, place.interrupted) == (lead.step, lead.interrupted)
    begun = place.step >= config.warmup_steps
    if config.delay:
        return begun and (bool(config.vectors) or _applied(config, place) == _applied(config, lead))
    return begun and meetings_so_far(config, place.step) == meetings_so_far(config, lead.step)


def _spoiled(config: SlowMoConfig, place: Place) -> bool:
    """Return whether a worker's own parameters may be of two states; while late exchanges are given, they are not."""
    return place.torn and not (config.delay and config.vectors and not _equal(config, place.step))


def _at_step_of(place: Place, lead: Place) -> bool:
    """Return whether a worker has made the step whose exchange was broken off on the leader."""
    return place.interrupted and lead.interrupted and place.step == lead.step


def _all_answer(places: Sequence[Place], stays: Sequence[bool]) -> bool:
    """Return whether all that stay have answered one exchange: none is left that has made the step before it."""
    return all(place.answers for place, stay in zip(places, stays, strict=True) if stay)


def _applied(config: SlowMoConfig, place: Place) -> tuple[int, ...]:
    return applied(config, place.step, place.launched)


def _equal(config: SlowMoConfig, step: int) -> bool:
    """Return whether all workers hold the same model after each step, since gradients are averaged."""
    return config.gradients == "all" or step < config.warmup_steps


def _unwritten(machine: Machine, written: set[int] | None) -> list[Chunk]:
    """Return the chunks of parameters without those of an outer step that have been written, which are equal."""
    return [chunk for chunk in machine.layout.parameter_chunks if chunk.index not in (written or ())]


def _plain(progress: Progress) -> dict[str, Any]:
    return {field: np.asarray(value) for field, value in progress.flat().items()}


def _finite(member: Member[R]) -> bool:
    """Return whether the values of this worker are finite of which a mean may take the place of a lost anchor."""
    if "anchor" not in member.config.sliced_vectors:
        return True
    store, launched = member.machine.runtime.store, np.asarray(member.read_progress().flight.launched)
    flying = (store.finite("in_flight", fragment) for fragment, step in enumerate(launched) if step)
    return bool(store.finite("model", None)) and all(map(bool, flying))


def _sliced_workers(
    machine: Machine,
    places: Sequence[Place],
    lead: Place,
    within: Sequence[bool],
    stays: Sequence[bool],
    finite: Sequence[bool],
) -> list[SlicedWorker]:
    """Return which workers have slices, and of which fragments they lack the last exchange."""
    config, fragments = machine.config, machine.layout.fragments
    done = [_applied(config, place) for place, stay in zip(places, stays, strict=True) if stay] if config.delay else []
    most = [max(each) for each in zip(*done, strict=True)]
    workers = []
    for place, inside, stay, usable in zip(places, within, stays, finite, strict=True):
        lacks = (place.started and not inside,) * fragments
        if config.delay and place.started:
            lacks = tuple(own < all_done for own, all_done in zip(_applied(config, place), most, strict=True))
        # Before the end of the warm-up there is no anchor of a block.
        begun = place.step >= config.warmup_steps or lead.step < config.warmup_steps
        workers.append(SlicedWorker(place.owner if begun else None, stay, lacks, usable))
    return workers


def _roll_forward(member: Member[R], places: Sequence[Place], stays: Sequence[bool], rank: int) -> set[int]:
    """Give the chunks of a broken-off outer step that some worker has written to all in the block; return all of them.

    Any of them serves: a chunk that two have written is bitwise the same.
    """
    machine = member.machine
    config, store = machine.config, machine.runtime.store
    vectors = ("model", *(name for name in ("anchor", "v") if name in config.vectors))
    keeps = machine.runtime.slices.keeps
    written = set()
    for chunk in machine.layout.chunks:
        having = [n for n, place in enumerate(places) if stays[n] and chunk.index in place.written]
        if not having:
            continue
        written.add(chunk.index)
        given = []
        if len(having) < sum(stays):
            for vector in vectors if chunk.role == "parameter" else vectors[:1]:
                if not keeps(vector, chunk.index):
                    given += [(vector, x * 1) for _, x in values_of(machine.runtime, having[0], [chunk], vector)]
        if not stays[rank] or rank in having:
            continue
        # All at once, and noted: if another is lost before the step goes on, a chunk has been stepped or it has not.
        for vector, values in given:
            store.write(vector, chunk, values)
        if chunk.role == "parameter" and "residual" in config.vectors:
            store.write("residual", chunk, store.read("residual", chunk) * 0)  # the result has it already
        if machine.runtime.writes_at_once:
            store.settle()  # tensors of which some parts have come
        machine.written = {*(machine.written or ()), chunk.index}
    return written


def _start_at(member: Member[R], leader: int, progress: Progress, lead: Place, takes: bool) -> None:
    """Let newcomers, and survivors of another block, start where the leader is: at the anchor, with no steps."""
    machine = member.machine
    runtime, store, config = machine.runtime, machine.runtime.store, machine.config
    copies = _equal(config, lead.step)
    parameters = runtime.layout.parameter_chunks
    former, launched = member.read_progress().flight.launched, progress.flight.launched.tolist()
    member.torn = member.torn or takes
    keeps = runtime.slices.keeps
    for vector in config.vectors:
        if vector != "residual":
            whole = [chunk for chunk in parameters if not keeps(vector, chunk.index)]
            take_chunks(runtime, leader, whole, vector, takes)
    roles = ("statistic", "optimizer_state") if config.vectors and not copies else None
    given = [chunk for chunk in runtime.layout.chunks if roles is None or chunk.role in roles]
    take_chunks(runtime, leader, given, "model", takes)
    if copies:
        give_in_flight(machine, leader, former, launched, takes)
    if not takes:
        return
    if roles is not None:
        for chunk in parameters:
            if not keeps("anchor", chunk.index):  # else it has been written when the slices were dealt
                store.write("model", chunk, store.read("anchor", chunk))
    store.settle()
    if copies:
        member.write_progress(progress, lead.interrupted)
    else:
        set_aside_anew(machine, former, launched)
        flight = progress.flight._replace(sent_since=progress.flight.sent_since * 0)
        member.write_progress(progress._replace(since=progress.since * 0, flight=flight))
    member.torn = False
