"""The workers' places when they come together: who leads, who keeps its part of the block, who begins anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.schedule import meetings_so_far
from hvd_slowmo.core.regroup.dealing import Owner
from hvd_slowmo.core.regroup.late_members import applied


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
        done = sum(applied_at(config, self))
        # Without an anchor nobody can be given what has been applied, so that it decides.
        first = 0 if config.vectors else done
        return self.started, not _spoiled(config, self), first, self.step, self.interrupted, done


class Standing(NamedTuple):
    """The places of all workers, and what follows from them; the same on all of them but for `rank`.

    Attributes:
        rank: of this worker.
        places: by rank.
        order: all ranks, first those that are further.
        within: by rank, whether a worker is in the leader's block.
        stays: by rank, whether a worker keeps its parameters and its part of the block.
        copies: all workers hold the same model, since gradients are averaged, and take the leader's.
        late: exchanges may be in flight.
    """

    rank: int
    places: Sequence[Place]
    order: tuple[int, ...]
    within: Sequence[bool]
    stays: Sequence[bool]
    copies: bool
    late: bool

    @property
    def leader(self) -> int:
        """Return the rank of the worker that is furthest."""
        return self.order[0]

    @property
    def lead(self) -> Place:
        """Return the place of the worker that is furthest."""
        return self.places[self.leader]

    @property
    def own(self) -> Place:
        """Return the place of this worker."""
        return self.places[self.rank]

    @property
    def own_stays(self) -> bool:
        """Return whether this worker keeps its parameters and its part of the block."""
        return self.stays[self.rank]

    @property
    def together(self) -> bool:
        """Return whether this worker has made the step whose exchange was broken off on the leader, and stays."""
        own, lead = self.own, self.lead
        return self.own_stays and own.interrupted and lead.interrupted and own.step == lead.step

    @property
    def all_answer(self) -> bool:
        """Return whether all that stay have answered one exchange: none is left that has made the step before it."""
        return all(place.answers for place, stay in zip(self.places, self.stays, strict=True) if stay)

    @property
    def takes(self) -> list[bool]:
        """Return by rank whether a worker takes the state that is handed out."""
        return [not place.started or (self.copies and rank != self.leader) for rank, place in enumerate(self.places)]

    @property
    def newcomers(self) -> tuple[int, ...]:
        """Return the ranks without a state before."""
        return tuple(rank for rank, place in enumerate(self.places) if not place.started)

    @property
    def behind(self) -> tuple[int, ...]:
        """Return the ranks whose last block was over elsewhere."""
        inside = zip(self.places, self.within, strict=True)
        return tuple(n for n, (place, within) in enumerate(inside) if place.started and not within and n != self.leader)


def standing_of(config: SlowMoConfig, places: Sequence[Place], rank: int) -> Standing:
    """Return who leads and who stays, where at least one worker has a state.

    Example:
        >>> standing = standing_of(SlowMoConfig(tau=4), [Place(True, 5), Place(), Place(True, 8)], rank=0)
        >>> standing.order, standing.stays, standing.newcomers, standing.behind
        ((2, 0, 1), [False, False, True], (1,), (0,))
    """
    order = tuple(sorted(range(len(places)), key=lambda rank: (*places[rank].ahead(config), -rank), reverse=True))
    leader, lead = order[0], places[order[0]]
    copies = equal_models(config, lead.step)
    within = [in_block_of(config, place, lead) for place in places]
    stays = [rank == leader or (each and not copies) for rank, each in enumerate(within)]
    return Standing(rank, places, order, within, stays, copies, config.delay > 0 and not copies)


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
    if equal_models(config, lead.step):
        return (place.step, place.interrupted) == (lead.step, lead.interrupted)
    begun = place.step >= config.warmup_steps
    if config.delay:
        return begun and (bool(config.vectors) or applied_at(config, place) == applied_at(config, lead))
    return begun and meetings_so_far(config, place.step) == meetings_so_far(config, lead.step)


def applied_at(config: SlowMoConfig, place: Place) -> tuple[int, ...]:
    """Return how many exchanges of each fragment a worker in this place has applied."""
    return applied(config, place.step, place.launched)


def equal_models(config: SlowMoConfig, step: int) -> bool:
    """Return whether all workers hold the same model after each step, since gradients are averaged."""
    return config.gradients == "all" or step < config.warmup_steps


def _spoiled(config: SlowMoConfig, place: Place) -> bool:
    """Return whether a worker's own parameters may be of two states; while late exchanges are given, they are not."""
    return place.torn and not (config.delay and config.vectors and not equal_models(config, place.step))
