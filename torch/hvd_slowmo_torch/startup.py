"""A PyTorch worker's part in the start: its description, and the state that it gives to others and takes from them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from hvd_slowmo.core.average.gradient_average import GradientAverage
from hvd_slowmo.core.parts.layout import lay_out
from hvd_slowmo.core.parts.slices import travels_in_slices
from hvd_slowmo.core.start.arguments import check_metrics
from hvd_slowmo.core.start.bulk import Body, Carrier, Gift, Parcel, give
from hvd_slowmo.core.start.choice import check_patterns
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.core.start.startup import Description, Job
from hvd_slowmo_torch.checks import check_inner_optimizer, check_types
from hvd_slowmo_torch.inner import inner_settings
from hvd_slowmo_torch.model.layout import TensorRef, groups_of, refs_of, state_refs
from hvd_slowmo_torch.model.parallel import refuse_data_parallel
from hvd_slowmo_torch.model.statistics import untrained_names
from hvd_slowmo_torch.tensors.bulk import TorchCarrier, bodies_of, is_plain, on_wire
from hvd_slowmo_torch.worker import TorchWorker

Own = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors of special kinds that the chunks do not carry, by name, and the inner optimizer's state_dict."""


class StartingTorchWorker:
    """`hvd_slowmo.core.start.startup.StartingWorker` of a PyTorch optimizer.

    Args:
        worker: the optimizer's.
        param_group: a group to add to the inner optimizer first.
    """

    framework = "PyTorch"
    started_before = False  # a start is part of the construction
    whole_in_flight = elastic = False
    carrier: Carrier = TorchCarrier()

    def __init__(self, worker: TorchWorker, param_group: dict[str, Any] | None = None) -> None:
        self.config, self.parameter_map = worker.config, worker.settings.parameter_map
        self.remarks: Mapping[str, Any] = {
            "PyTorch": torch.__version__,
            "the inner optimizer": type(worker.inner).__name__,
        }
        self._worker = worker
        self._param_group = param_group
        self._description: Description[TensorRef] | None = None

    def describe(self) -> Description[TensorRef]:
        model, inner, settings = self._worker.model, self._worker.inner, self._worker.settings
        if self._param_group is not None:
            inner.add_param_group(self._param_group)
        check_types(inner, model, settings)
        refuse_data_parallel(model, self.config.gradients, self._worker.comm.ranks)
        refs = refs_of(model, inner, settings.parameter_map, settings.statistics)
        if self._param_group is None:  # a group that is added may be what a pattern is of: it is trained from now on
            trained = {id(p) for group in inner.param_groups for p in group["params"]}
            check_patterns(untrained_names(model, trained), settings.statistics or {})
        groups = groups_of(refs, model, inner)
        specs = [ref.spec for ref in refs]
        if self.config.inner_state == "average" and self.config.tau is not None:
            refs += state_refs(model, inner)
        sliced = partial(travels_in_slices, self.config)
        layout = lay_out(refs, groups, settings.chunk_bytes, self.config.fragments, sliced)
        self._description = Description(specs, groups, layout)
        check_inner_optimizer(inner, self.config)
        check_metrics(settings.metrics)
        return self._description

    def position(self) -> tuple[int, int, int | None]:
        return 0, 0, None

    def entered(self) -> bool:
        return False  # there was no training before

    def assemble(self, description: Description[TensorRef], graph: Graph | None) -> None:
        self._worker.assemble(description.layout, description.groups, graph)

    def frozen(self) -> dict[str, Body]:
        return {spec.name: on_wire(self._worker.model, spec) for spec in self._frozen}

    def own(self, job: Job) -> Gift:
        inner, others = self._worker.inner, self._others()

        def values() -> Own:
            return _on_cpu(({name: x for name, x in others.items() if not is_plain(x)}, inner.state_dict()))  # type: ignore[no-any-return]

        named = bodies_of({name: x for name, x in others.items() if is_plain(x)})
        return Gift(named, values, make_room=inner.state.clear)

    def take(self, values: Own) -> None:
        tensors, state = values
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._others()[name].copy_(tensor)
        inner = self._worker.inner
        current = inner.state_dict()
        if state["state"] or current["state"] or _group_settings(state) != _group_settings(current):
            inner.load_state_dict(state)

    @torch.no_grad()
    def first_vectors(self, job: Job) -> None:
        self._worker.mixed = job.mixed
        inner_settings.record(self._worker.inner)
        self._worker.progress = self._worker.assembly.machine.start()
        self._worker.started = True

    @property
    def _specs(self) -> Any:
        assert self._description is not None, "described before"
        return self._description.specs

    @property
    def _frozen(self) -> list[Any]:
        return [spec for spec in self._specs if spec.role == "frozen"]

    def _others(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the model that neither the chunks nor the frozen ones of a map carry."""
        model = self._worker.model
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}  # chunks leave these alone
        carried = {spec.own for spec in self._specs if spec.role != "frozen"} - frozen
        carried |= {spec.own for spec in self._frozen}
        named = [*model.named_parameters(), *model.named_buffers()]
        return {name: x.detach() for name, x in named if name not in carried}


def hand_over(inner: Optimizer, average: GradientAverage) -> None:
    """Give everybody one worker's inner state; learning rates and other settings stay. A collective.

    Args:
        inner: the inner optimizer.
        average: the workers; its `catch_up_from` is the giver.
    """
    comm, giver = average.comm, int(average.catch_up_from.get())
    gift = Gift(
        values=lambda: (_on_cpu(inner.state_dict()["state"]), inner_settings.dump(inner)), make_room=inner.state.clear
    )
    (values,) = give(comm, "state", [Parcel(giver, lambda: gift)], TorchCarrier())
    if comm.rank != giver:
        state, settings = values
        groups = inner.param_groups
        inner.load_state_dict({**inner.state_dict(), "state": state})
        inner.param_groups = groups  # loading copies them, and schedulers may hold a rate that is a tensor
        inner_settings.prepare(inner, settings)()


def _on_cpu(item: Any) -> Any:
    """Return the same structure with tensors of special kinds in host memory: a device is this worker's own."""
    if isinstance(item, torch.Tensor):
        return item if is_plain(item) else item.cpu()
    if isinstance(item, dict):
        return {key: _on_cpu(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return type(item)(_on_cpu(value) for value in item)
    return item


def _group_settings(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the param_groups, with rates that are tensors as numbers so that they can be compared."""
    return [
        {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
