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
from typing import Any, NamedTuple

import numpy as np

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.core.average.broadcast import average_chunks
from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.core.regroup.following import follow
from hvd_slowmo.core.regroup.handover import roll_forward, start_at, unwritten
from hvd_slowmo.core.regroup.late_members import (
    Flying,
    LateWorker,
    catch_up,
    in_flight_together,
    launch_unlaunched,
    state_of_leader,
    take_applied,
)
from hvd_slowmo.core.regroup.member import Member, R
from hvd_slowmo.core.regroup.places import Place, Standing, standing_of
from hvd_slowmo.core.regroup.sliced_members import deal_slices, sliced_workers
from hvd_slowmo.core.start.graph import agreed_graph
from hvd_slowmo.core.start.startup import Job, agree, common_groups, hand_out, regrouped, start

logger = logging.getLogger("hvd_slowmo")


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
    config = member.config
    description = agree(member, comm)
    if member.parameter_map is not None:
        description = regrouped(description, common_groups([description.groups.of] * comm.size, comm.rank))
    standing = standing_of(config, places, comm.rank)  # once settings are known to be equal
    member.reassemble(description, agreed_graph(config, comm))
    if config.delay:
        comm.open_beside()
    states, finite = _states_of_all(member, comm, standing)
    lead = standing.lead
    job = Job(tuple(place.framework for place in places), (lead.step,) * comm.size, description.groups)
    if any(standing.takes):
        hand_out(member, comm, job, standing.order, standing.takes)
    late = _in_flight(member, standing, states) if standing.late else None
    written = None if standing.late else _written_by_some(member, standing, comm)
    arrived = _slices(member, standing, finite, late, written) if config.sliced_vectors else {}
    if late is not None and standing.own_stays:  # at once: what follows may be broken off too
        _catch_up(member, standing, late, arrived)
    if not all(standing.stays):
        progress = states[standing.leader] if late is None else late.of_leader
        assert progress is not None, "the leader has told its state"
        start_at(member, standing, progress)
    if late is None and standing.own_stays:
        _count_interrupted(member, standing)
        member.write_progress(member.read_progress()._replace(step=lead.step), standing.together)
    machine = member.machine
    if config.gossip is not None and not standing.copies:
        average_chunks(machine.runtime, unwritten(machine, written), standing.stays)
        machine.runtime.store.settle()
    member.broken_off.torn = False
    machine.meetings.written = written if lead.interrupted else None  # else no worker is left that has made this step
    if lead.interrupted:
        _end_interrupted_step(member, standing)
    machine.flights.resume(member.read_progress())
    member.broken_off.answered = None
    if comm.rank == standing.leader:
        logger.info(
            "%s: %d workers go on at step %d; %d are new, %d had to skip a block",
            comm.name,
            comm.size,
            lead.step + lead.interrupted,
            len(standing.newcomers),
            len(standing.behind),
        )
    return Reformed(job, standing.order, standing.newcomers, standing.behind)


class _Late(NamedTuple):
    """Late exchanges, and the states that they belong to."""

    flying: Flying
    workers: Sequence[LateWorker]
    of_leader: Progress  # once it has caught up


def _states_of_all(
    member: Member[R], comm: ScopedComm, standing: Standing
) -> tuple[list[Progress | None], Sequence[bool]]:
    """Return by rank the scalar states, None of those that need not tell theirs, and `_finite`."""
    tells = comm.rank == standing.leader or (standing.late and standing.own.started)
    told = comm.gather("progress", (_plain(member.read_progress()) if tells else None, _finite(member)))
    everyone, finite = zip(*told, strict=True)
    return [None if each is None else Progress.from_flat(each) for each in everyone], finite


def _in_flight(member: Member[R], standing: Standing, states: Sequence[Progress | None]) -> _Late:
    """Find what is in flight on all, and take anchor and v of what another worker has applied."""
    initial = member.machine.initial()  # of newcomers
    seen = zip(states, standing.stays, standing.places, strict=True)
    workers = [LateWorker(state or initial, stay, place.torn) for state, stay, place in seen]
    flying = in_flight_together(member.config, workers, standing.leader)
    of_leader = state_of_leader(workers, standing.leader, flying)
    member.broken_off.torn = standing.own.torn or any(standing.rank in take for take in flying.take)
    take_applied(member.machine, flying, standing.rank)
    return _Late(flying, workers, of_leader)


def _written_by_some(member: Member[R], standing: Standing, comm: ScopedComm) -> set[int] | None:
    """Hand out what some have written of an outer step that was broken off; return its chunks, None without one."""
    if not (standing.lead.interrupted or standing.all_answer):
        return None
    written = roll_forward(member, standing)
    if not standing.lead.interrupted:  # nobody forgets what has been written before all have it
        comm.gather("written", None)
    return written


def _slices(
    member: Member[R], standing: Standing, finite: Sequence[bool], late: _Late | None, written: set[int] | None
) -> dict[int, Any]:
    """Deal slices among the present workers; return the values that have arrived, by chunk."""
    machine, flying = member.machine, late and late.flying
    workers = sliced_workers(machine, standing, finite)
    member.broken_off.torn = member.broken_off.torn or not standing.own_stays
    former = member.former_slices() if workers[standing.rank].owner is not None else None
    present = member.read_progress()
    if flying is not None:
        present = launch_unlaunched(machine, present, flying, standing.rank)
    arrived = deal_slices(machine, former, present, workers, flying, written)
    member.forget_former_slices()
    return arrived


def _catch_up(member: Member[R], standing: Standing, late: _Late, arrived: dict[int, Any]) -> None:
    """Apply what others have applied, and launch what they have launched."""
    _count_interrupted(member, standing)
    caught_up = catch_up(member.machine, member.read_progress(), late.flying, standing.rank, late.workers, arrived)
    member.write_progress(caught_up._replace(step=standing.lead.step), standing.together)
    member.broken_off.torn = False


def _count_interrupted(member: Member[R], standing: Standing) -> None:
    """Count a step of this worker alone whose exchange was broken off, and is not the one that is taken again."""
    if standing.own.interrupted and not standing.together:
        member.count_step()


def _end_interrupted_step(member: Member[R], standing: Standing) -> None:
    """Take the exchange that was broken off again, as a worker that has made the step before it or as in a join."""
    made = standing.copies or standing.together
    machine = member.machine
    if made:
        member.finish_step()
        return
    member.broken_off.answered = standing.lead.step  # as in a join: the others make this step
    if standing.late or member.config.gossip is not None:
        member.write_progress(machine.pass_step(member.read_progress()))
    else:
        member.write_progress(follow(machine, member.read_progress()).progress)


def _plain(progress: Progress) -> dict[str, Any]:
    return {field: np.asarray(value) for field, value in progress.flat().items()}


def _finite(member: Member[R]) -> bool:
    """Return whether the values of this worker are finite of which a mean may take the place of a lost anchor."""
    if "anchor" not in member.config.sliced_vectors:
        return True
    store, launched = member.machine.runtime.store, np.asarray(member.read_progress().flight.launched)
    flying = (store.finite("in_flight", fragment) for fragment, step in enumerate(launched) if step)
    return bool(store.finite("model", None)) and all(map(bool, flying))
