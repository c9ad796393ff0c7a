"""The start of a job, the same sequence of collectives in every framework: where everyone is, and who gives what.

A job may have workers of several frameworks. What one framework's workers alone can read (a base optimizer's state)
comes from the first of them; what all can read comes from rank 0.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.layout import Layout
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo.wire.tensors import WireEntry, describe


class Position(NamedTuple):
    """What a worker tells the others once they have agreed."""

    framework: str
    step: int  # inner steps that it has made already
    workers: int  # of the job that its state comes from; 0: it has none
    groups: tuple[int, ...]  # its parameter group of each trained entry of the wire


@dataclass(frozen=True)
class Groups:
    """The parameter groups that all workers have in common.

    Frameworks and scripts may group the same parameters otherwise. Two parameters are in one common group if they are
    in one group on every worker, so that a common group has one rate everywhere.

    of: the common group of each trained entry of the wire.
    own: this worker's own group, for each common one.
    """

    of: tuple[int, ...]
    own: tuple[int, ...]

    def common(self, own: int) -> int | None:
        """A common group with the rates of this worker's own one; None if nothing of that one is on the wire."""
        return self.own.index(own) if own in self.own else None


def common_groups(everyone: Sequence[Sequence[int]], rank: int) -> Groups:
    """The coarsest groups that are within one group on every worker, in wire order."""
    tuples = list(zip(*everyone, strict=True))
    numbers = {each: number for number, each in enumerate(dict.fromkeys(tuples))}
    return Groups(tuple(numbers[each] for each in tuples), tuple(each[rank] for each in numbers))


@dataclass(frozen=True)
class Job:
    """Who works together, and where all are."""

    frameworks: tuple[str, ...]  # by rank
    steps: tuple[int, ...]
    groups: Groups

    @property
    def mixed(self) -> bool:
        """Whether there are workers of several frameworks."""
        return len(set(self.frameworks)) > 1

    @property
    def fresh(self) -> bool:
        """Whether nobody has made a step."""
        return not any(self.steps)

    @property
    def restored_first(self) -> bool:
        """Whether rank 0 alone has loaded a checkpoint."""
        return bool(self.steps[0]) and not any(self.steps[1:])


def facts_of(
    config: SlowMoConfig,
    framework: str,
    parameter_map: ParameterMap | None,
    entries: Sequence[WireEntry],
    layout: Layout,
) -> dict[str, Any]:
    """What workers must agree on, see `hvd_slowmo.core.handshake.agree`.

    With a map the wire decides, whatever the framework; without one, names and order are the framework's own.
    """
    facts: dict[str, Any] = {
        "config": config.facts(),
        "parameter_map": None if parameter_map is None else parameter_map.describe(),
    }
    if parameter_map is None:
        facts["framework, of workers without a parameter_map"] = framework
    elif config.buffers == "average" and config.tau is not None:
        # What they keep has other names, shapes and units in another framework.
        facts["framework, which buffers='average' needs to be one, since it averages what base optimizers keep"] = (
            framework
        )
    if parameter_map is None:
        facts["parameters"] = layout.describe()
    else:
        facts["parameters"] = describe(entries)
        facts["buffers of the base optimizer"] = [list(each) for each in layout.describe() if each[0] == "base"]
    return facts


def meet(comm: Comm, name: str, mine: Position) -> Job:
    """Learn where everybody is. A collective, of workers that have agreed on their facts.

    Raises:
        ValueError: on every worker, if their steps can't be brought to one start.
    """
    everyone = [Position(*each) for each in comm.gather(f"{name}.position", tuple(mine))]
    job = Job(
        tuple(each.framework for each in everyone),
        tuple(each.step for each in everyone),
        common_groups([each.groups for each in everyone], comm.rank),
    )
    for rank, each in zip(comm.ranks, everyone, strict=True):
        if each.step and each.workers not in (0, comm.size):
            raise ValueError(
                f"{name}: the state on rank {rank} is one of {each.workers} workers, this job has {comm.size}."
            )
    here = ", ".join(f"rank {r} step {s}" for r, s in zip(comm.ranks, job.steps, strict=True))
    if job.mixed and not job.fresh:
        raise ValueError(
            f"{name}: a job of several frameworks starts at step 0 on every worker, and here is {here}. Restore every "
            "worker's own state after the start."
        )
    if any(job.steps[1:]) and len(set(job.steps)) > 1:
        raise ValueError(
            f"{name}: the workers are not at the same step: {here}. Load a checkpoint on rank 0 alone, or files of the "
            "same step on every rank."
        )
    return job


def hand_out(
    comm: Comm, name: str, job: Job, common: Callable[[], Any], own: Callable[[], Any]
) -> tuple[Any | None, Any | None]:
    """What the chunks do not carry. A collective.

    Args:
        common: what rank 0 gives to all: it must be readable without a framework.
        own: what the first worker of this one's framework gives to the others of it.

    Returns:
        Both as they came; None where this worker is the one that gives it.
    """
    mine = job.frameworks[comm.rank]
    giver = job.frameworks.index(mine)
    # As bytes within the message: who lacks the framework must not unpack it.
    given = (common() if comm.rank == 0 else None, pickle.dumps(own()) if comm.rank == giver else None)
    everyone = comm.gather(f"{name}.start", given)
    return (
        None if comm.rank == 0 else everyone[0][0],
        None if comm.rank == giver else pickle.loads(everyone[giver][1]),
    )
