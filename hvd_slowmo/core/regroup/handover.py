"""Chunks that workers hand over when they come together: of a broken-off outer step, and of the leader's state."""

from __future__ import annotations

from hvd_slowmo.core.average.broadcast import take_chunks, values_of
from hvd_slowmo.core.parts.layout import Chunk
from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.core.regroup.late_members import give_in_flight, set_aside_anew
from hvd_slowmo.core.regroup.member import Member, R
from hvd_slowmo.core.regroup.places import Standing
from hvd_slowmo.core.step.machine import Machine


def roll_forward(member: Member[R], standing: Standing) -> set[int]:
    """Give the chunks of a broken-off outer step that some worker has written to all in the block; return all of them.

    Any of them serves: a chunk that two have written is bitwise the same.
    """
    machine, places, stays, rank = member.machine, standing.places, standing.stays, standing.rank
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
        machine.meetings.written = {*(machine.meetings.written or ()), chunk.index}
    return written


def start_at(member: Member[R], standing: Standing, progress: Progress) -> None:
    """Let newcomers, and survivors of another block, start where the leader is: at the anchor, with no steps."""
    machine = member.machine
    runtime, store, config = machine.runtime, machine.runtime.store, machine.config
    leader, lead, copies, takes = standing.leader, standing.lead, standing.copies, not standing.own_stays
    parameters = runtime.layout.parameter_chunks
    former, launched = member.read_progress().flight.launched, progress.flight.launched.tolist()
    member.broken_off.torn = member.broken_off.torn or takes
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
    member.broken_off.torn = False


def unwritten(machine: Machine, written: set[int] | None) -> list[Chunk]:
    """Return the chunks of parameters without those of an outer step that have been written, which are equal."""
    return [chunk for chunk in machine.layout.parameter_chunks if chunk.index not in (written or ())]
