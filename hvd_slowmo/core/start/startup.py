"""The start of a job: one sequence of collectives for every framework.

digest → graph → position → layout → handed-out state → first vectors. A job may have workers of several frameworks.
State that one framework alone can read (an inner optimizer's) comes from the first worker of that framework; all else
comes from rank 0.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.layout import ModelLayout, ParameterGroups, Ref
from hvd_slowmo.core.start.announcement import announcement
from hvd_slowmo.core.start.bulk import Body, Carrier, Gift, Parcel, give
from hvd_slowmo.core.start.graph import Graph, agreed_graph
from hvd_slowmo.core.start.handshake import agreed
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo.wire.tensors import TensorSpec, describe

R = TypeVar("R", bound=Ref)

logger = logging.getLogger("hvd_slowmo")

NAME_FACT = "name, by the order in which optimizers of one name were constructed"


@dataclass(frozen=True)
class Description(Generic[R]):
    """A worker's findings about its own model, before any communication.

    Attributes:
        specs: the tensors that take part.
        groups: this worker's own parameter groups.
        layout: of the messages; later with the groups that all workers have in common.
    """

    specs: Sequence[TensorSpec]
    groups: ParameterGroups
    layout: ModelLayout[R]


class Position(NamedTuple):
    """A worker's message to the others once they have agreed."""

    framework: str
    step: int  # inner steps that it has made already
    workers: int  # of the job that its state comes from; 0: it has none
    groups: tuple[int, ...]  # its parameter group of each trained tensor of the wire
    entered: bool = False  # its parameters were given other values since the last training ended
    slices_of: int | None = None  # place of the worker whose slices its state has; None: it has none


@dataclass(frozen=True)
class Job:
    """The workers of a job and their positions.

    Attributes:
        frameworks: by rank.
        steps: inner steps made, by rank.
        groups: the parameter groups that all workers have in common.
        entered: ranks whose parameters were given other values since the last training ended.
    """

    frameworks: tuple[str, ...]
    steps: tuple[int, ...]
    groups: ParameterGroups
    entered: tuple[int, ...] = ()

    @property
    def mixed(self) -> bool:
        """True with workers of several frameworks."""
        return len(set(self.frameworks)) > 1

    @property
    def fresh(self) -> bool:
        """True if no worker has made a step."""
        return not any(self.steps)

    @property
    def restored_first(self) -> bool:
        """True if rank 0 alone has loaded a checkpoint."""
        return bool(self.steps[0]) and not any(self.steps[1:])


class StartingWorker(Protocol[R]):
    """An adapter's part in the start.

    Attributes:
        framework: its name.
        config: the settings.
        parameter_map: names of the tensors in other frameworks; None in a job of one framework.
        remarks: facts that may differ between workers with a warning, such as versions.
        started_before: this optimizer has been brought to a start before.
        whole_in_flight: as of `hvd_slowmo.core.start.memory.bytes_beside_model`.
        carrier: of the tensors that the chunks do not carry.
        elastic: other workers may take the place of these.
    """

    framework: str
    config: SlowMoConfig
    parameter_map: ParameterMap | None
    remarks: Mapping[str, Any]
    started_before: bool
    whole_in_flight: bool
    carrier: Carrier
    elastic: bool

    def describe(self) -> Description[R]:
        """Check the arguments and lay out the model.

        Raises:
            TypeError, ValueError: an argument is wrong; it is raised on every worker.
        """

    def position(self) -> tuple[int, int, int | None]:
        """Return `step`, `workers` and `slices_of` of this worker's `Position`."""

    def entered(self) -> bool:
        """Return whether the parameters were given other values since this job's last training ended."""

    def assemble(self, description: Description[R], graph: Graph | None) -> None:
        """Make everything that a step needs."""

    def frozen(self) -> Mapping[str, Body]:
        """Return the frozen tensors of a map in the wire's form, which is that of every framework."""

    def own(self, job: Job) -> Gift:
        """Return all else that the chunks do not carry, for or from the other workers of this framework."""

    def take(self, values: Any) -> None:
        """Take over the values of another worker's `own`, whose named tensors have been written already."""

    def first_vectors(self, job: Job) -> None:
        """Take rank 0's vectors and the first anchor, or continue from restored ones. A collective."""


def start(worker: StartingWorker[R], comm: ScopedComm) -> Job:
    """Bring all workers to one start. A collective.

    Raises:
        TypeError, ValueError: on every worker, if an argument is wrong on one, settings or models differ, or their
            steps can't be brought to one start.
    """
    description = agree(worker, comm)
    graph = agreed_graph(worker.config, comm)
    step, workers, slices_of = worker.position()
    own = Position(worker.framework, step, workers, description.groups.of, worker.entered(), slices_of)
    job = meet(comm, own)
    if worker.parameter_map is not None:
        description = regrouped(description, job.groups)
    worker.assemble(description, graph)
    if worker.config.delay:
        comm.open_beside()
    if job.fresh or job.restored_first:
        hand_out(worker, comm, job, range(comm.size), [True] * comm.size)
    worker.first_vectors(job)
    if comm.rank == 0 and not worker.started_before:
        words = announcement(
            worker.config, description.layout.layout, graph, comm.size, whole_in_flight=worker.whole_in_flight
        )
        logger.info("%s: %s", comm.name, words)
    return job


def agree(worker: StartingWorker[R], comm: ScopedComm) -> Description[R]:
    """Return this worker's description, once all workers have compared theirs. A collective."""

    def make() -> tuple[Description[R], dict[str, Any]]:
        description = worker.describe()
        return description, {NAME_FACT: comm.name, **facts_of(worker, description)}

    return agreed(comm.handshake, make, worker.remarks)


def facts_of(worker: StartingWorker[R], description: Description[R]) -> dict[str, Any]:
    """Return the facts on which workers must agree.

    With a map the wire decides, whatever the framework; without one, names and order are the framework's own.
    """
    config, parameter_map, layout = worker.config, worker.parameter_map, description.layout.layout
    facts: dict[str, Any] = {
        "config": config.common_facts(),
        "parameter_map": None if parameter_map is None else parameter_map.describe(),
    }
    if parameter_map is None:
        facts["framework, of workers without a parameter_map"] = worker.framework
    elif config.inner_state == "average" and config.tau is not None:
        # Inner optimizers keep state of other names, shapes and units in another framework.
        facts[
            "framework, which inner_state='average' needs to be one, since it averages the inner optimizers' state"
        ] = worker.framework
    if parameter_map is None:
        facts["parameters"] = layout.describe()
    else:
        facts["parameters"] = describe(description.specs)
        facts["state of the inner optimizer"] = [list(x) for x in layout.describe() if x[0] == "optimizer_state"]
        if worker.elastic:
            # The position of those that go on has a place for each group.
            groups = common_groups([description.groups.of], 0).of
            facts["parameter groups, which an elastic job needs to be the same on all workers"] = groups
    return facts


def regrouped(description: Description[R], groups: ParameterGroups) -> Description[R]:
    """Return the description with the groups that all workers have in common."""
    layout = description.layout.regrouped(groups, description.specs)
    return replace(description, groups=groups, layout=layout)


def common_groups(everyone: Sequence[Sequence[int]], rank: int) -> ParameterGroups:
    """Return the coarsest groups that are within one group on every worker, in wire order.

    Args:
        everyone: per worker, its own group of each parameter.
        rank: of this worker.
    """
    tuples = list(zip(*everyone, strict=True))
    numbers = {each: number for number, each in enumerate(dict.fromkeys(tuples))}
    return ParameterGroups(tuple(numbers[each] for each in tuples), tuple(each[rank] for each in numbers))


def meet(comm: ScopedComm, position: Position) -> Job:
    """Exchange the positions. A collective, of workers that have agreed on their facts.

    Raises:
        ValueError: on every worker, if their steps can't be brought to one start.
    """
    everyone = [Position(*each) for each in comm.gather("position", tuple(position))]
    job = Job(
        tuple(each.framework for each in everyone),
        tuple(each.step for each in everyone),
        common_groups([each.groups for each in everyone], comm.rank),
        tuple(rank for rank, each in zip(comm.ranks, everyone, strict=True) if each.entered),
    )
    for rank, each in zip(comm.ranks, everyone, strict=True):
        if each.step and each.workers not in (0, comm.size):
            raise ValueError(
                f"{comm.name}: the state on rank {rank} is one of {each.workers} workers, this job has {comm.size}."
            )
        if each.step and each.slices_of is not None and comm.ranks[each.slices_of] != rank:
            raise ValueError(
                f"{comm.name}: the state on rank {rank} is that of rank {comm.ranks[each.slices_of]}, and with few "
                "bits or shard=True each rank has its own. Load each rank's own file, or a checkpoint of save()."
            )
    if job.restored_first and comm.size > 1 and everyone[0].slices_of is not None:
        raise ValueError(
            f"{comm.name}: rank {comm.ranks[0]} alone has loaded a state, and with few bits or shard=True each rank "
            "has its own. Load each rank's own file, or a checkpoint of save()."
        )
    steps = ", ".join(f"rank {r} step {s}" for r, s in zip(comm.ranks, job.steps, strict=True))
    if job.mixed and not job.fresh:
        raise ValueError(
            f"{comm.name}: a job of several frameworks starts at step 0 on every worker, and here is {steps}. Restore "
            "every worker's own state after the start."
        )
    if any(job.steps[1:]) and len(set(job.steps)) > 1:
        raise ValueError(
            f"{comm.name}: the workers are not at the same step: {steps}. Load a checkpoint on rank 0 alone, or files "
            "of the same step on every rank."
        )
    return job


def hand_out(
    worker: StartingWorker[R], comm: ScopedComm, job: Job, order: Sequence[int], takes: Sequence[bool]
) -> None:
    """Hand out the state that the chunks do not carry. A collective.

    The first worker gives the frozen tensors of a map to all. The first worker of each framework gives the rest to the
    others of it: only they can read it.

    Args:
        order: all ranks, first those whose state counts.
        takes: by rank, whether a worker takes the others' state where it gives none.
    """
    givers: dict[str, int] = {}
    for rank in order:
        givers.setdefault(job.frameworks[rank], rank)
    giver = givers[worker.framework]
    takes_part = takes[comm.rank] or comm.rank in (order[0], giver)
    parcels = [Parcel(order[0], (lambda: Gift(worker.frozen())) if takes_part else None)]
    for framework, rank in givers.items():
        mine = framework == worker.framework and takes_part
        parcels.append(Parcel(rank, (lambda: worker.own(job)) if mine else None))
    _, *owns = give(comm, "start", parcels, worker.carrier)
    if takes[comm.rank] and comm.rank != giver:
        worker.take(owns[list(givers).index(worker.framework)])
