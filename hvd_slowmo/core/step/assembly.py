"""Everything that a worker's steps need, once the workers have started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from hvd_slowmo.core.average.gradient_average import GradientAverages
from hvd_slowmo.core.parts.layout import ModelLayout, ParameterGroups, Ref
from hvd_slowmo.core.parts.runtime import Runtime
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.core.step.machine import Machine

R = TypeVar("R", bound=Ref)


@dataclass(frozen=True)
class Assembly(Generic[R]):
    """The parts of one worker's optimizer.

    Attributes:
        layout: of the messages, and where the tensors are.
        groups: the parameter groups that all workers have in common.
        graph: of the gossip; None without.
    """

    runtime: Runtime
    layout: ModelLayout[R]
    groups: ParameterGroups
    graph: Graph | None
    machine: Machine
    averages: GradientAverages


def assemble(runtime: Runtime, layout: ModelLayout[R], groups: ParameterGroups, graph: Graph | None) -> Assembly[R]:
    """Return the parts that work on this runtime."""
    return Assembly(runtime, layout, groups, graph, Machine(runtime, graph), GradientAverages(runtime))
