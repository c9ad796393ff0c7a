"""Slices when the workers come together: each gives its own of the last exchange that anybody has applied.

    it has applied that one too     its slices as they are
    it has not, on PyTorch          the new slices, which it has made for the others and kept until their answer comes
    it has not, in a trace          none: its slices are lost, as those of lost workers

Of an anchor in slices nobody has the part that is lost. Its place takes the mean of the values that meet next there, of
the workers that have applied the exchange: those in flight, or else their parameters. The others start from that mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hvd_slowmo.core.parts.layout import Chunk
from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.core.regroup.dealing import FormerSlices, Owner, Share, deal_anew
from hvd_slowmo.core.regroup.late_members import Flying
from hvd_slowmo.core.regroup.places import Standing, applied_at
from hvd_slowmo.core.step.machine import Machine


class SlicedWorker(NamedTuple):
    """A worker in whose place others look when they come together."""

    owner: Owner | None  # of its slices; None: it has none of use
    stays: bool  # it keeps its parameters
    lacks: tuple[bool, ...]  # by fragment, whether others have applied an exchange that it has not
    finite: bool  # its values, of which a mean may take the place of a lost anchor


def sliced_workers(machine: Machine, standing: Standing, finite: Sequence[bool]) -> list[SlicedWorker]:
    """Return which workers have slices, and of which fragments they lack the last exchange."""
    config, fragments = machine.config, machine.layout.fragments
    places, lead, stays = standing.places, standing.lead, standing.stays
    done = (
        [applied_at(config, place) for place, stay in zip(places, stays, strict=True) if stay] if config.delay else []
    )
    most = [max(each) for each in zip(*done, strict=True)]
    workers = []
    for place, inside, stay, usable in zip(places, standing.within, stays, finite, strict=True):
        lacks = (place.started and not inside,) * fragments
        if config.delay and place.started:
            lacks = tuple(own < all_done for own, all_done in zip(applied_at(config, place), most, strict=True))
        # Before the end of the warm-up there is no anchor of a block.
        begun = place.step >= config.warmup_steps or lead.step < config.warmup_steps
        workers.append(SlicedWorker(place.owner if begun else None, stay, lacks, usable))
    return workers


def deal_slices(
    machine: Machine,
    former: FormerSlices | None,
    progress: Progress,
    workers: Sequence[SlicedWorker],
    flying: Flying | None,
    written: set[int] | None,
) -> dict[int, Any]:
    """Deal the slices anew. A collective of all workers, after which the former slices can be forgotten.

    A worker that starts anew gets the anchor as its model.

    Args:
        former: this worker's; None: it has none.
        progress: of this worker, before it catches up with late exchanges.
        workers: by rank.
        flying: the late exchanges; None without, and where all take one worker's state.
        written: chunks that some worker has written of an outer step that was broken off.

    Returns:
        By chunk, the model's new values on a worker that catches up with an exchange which others have applied.
    """
    runtime, store = machine.runtime, machine.runtime.store
    own = workers[runtime.comm.rank]
    if former is not None:
        former = _with_unanswered(machine, former, own, written or set())
    shares = [_share(machine, progress, workers, flying, own, f) for f in range(machine.layout.fragments)]
    arrived: dict[int, Any] = {}

    def whole_anchor(chunk: Chunk, anchor: Any, parts: Sequence[Any]) -> None:
        if not own.stays:
            store.write("model", chunk, anchor)
        elif flying is not None and own.lacks[chunk.fragment]:
            trained = store.read("model", chunk) - store.read("in_flight", chunk)
            nothing = store.zeros(chunk)  # where the others' mean counts, and what they have trained is in it
            kept = [(nothing if giver is None else trained)[start:stop] for start, stop, giver in parts]
            arrived[chunk.index] = anchor + runtime.ops.joined(kept)

    deal_anew(runtime, former, shares, whole_anchor)
    return arrived


def _share(
    machine: Machine,
    progress: Progress,
    workers: Sequence[SlicedWorker],
    flying: Flying | None,
    own: SlicedWorker,
    fragment: int,
) -> Share:
    gives = machine.runtime.ops.keeps_handles
    owners = [worker.owner if gives or not worker.lacks[fragment] else None for worker in workers]
    has = [float(worker.stays and not worker.lacks[fragment]) for worker in workers]
    if any(each and worker.finite for each, worker in zip(has, workers, strict=True)):
        has = [each * worker.finite for each, worker in zip(has, workers, strict=True)]
    steps = flying.weights[fragment] if flying is not None else has
    weights = [float(w) if each else 0.0 for w, each in zip(steps, has, strict=True)]
    flies = machine.config.delay > 0 and progress.flight.launched[fragment] > 0 and not own.lacks[fragment]
    if flying is not None and not flying.launched[fragment]:  # it will be dropped
        flies = False
    return Share(owners, weights if any(weights) else has, "in_flight" if flies else "model")


def _with_unanswered(machine: Machine, former: FormerSlices, own: SlicedWorker, written: set[int]) -> FormerSlices:
    """Return this worker's slices, the new ones of exchanges that others have applied.

    Their results have not come here, but this worker's part of them, its slice, has gone to all others.
    """
    unanswered, vectors, chunks = machine.meetings.unanswered, machine.config.sliced_vectors, machine.layout.chunks

    def read(vector: str, chunk: int) -> Any:
        if chunk in unanswered and (own.lacks[chunks[chunk].fragment] or chunk in written):
            return unanswered[chunk][vectors.index(vector)]
        return former.read(vector, chunk)

    return FormerSlices(former.owner, read)
