"""What `hvd_slowmo.checkpoint.job` needs of a PyTorch worker: its tensors by their names, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from hvd_slowmo.checkpoint.file import Arrays, CheckpointError
from hvd_slowmo.checkpoint.inner_state import ADAM, ALIKE, SGD, Buffers, Carried
from hvd_slowmo.checkpoint.state import Named
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.progress import Progress
from hvd_slowmo.core.startup import Groups
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo.wire.tensors import TensorSpec
from hvd_slowmo.wire.views import View
from hvd_slowmo_torch import inner_optimizer as base_state
from hvd_slowmo_torch.interop.layers import entries_torch
from hvd_slowmo_torch.interop.weights import array_of, tensors_of
from hvd_slowmo_torch.layout import Plan

_KEYS = {
    SGD: {"momentum": "momentum_buffer"},
    ADAM: {"moment1": "exp_avg", "moment2": "exp_avg_sq", "moment2_max": "max_exp_avg_sq", "steps": "step"},
}

Vectors = Mapping[str, list[torch.Tensor | None]]


class TorchSide:
    """`hvd_slowmo.checkpoint.state.Side` of a SlowMo optimizer.

    Args:
        plan: what travels.
        groups: the parameter groups that all workers have in common.
        vectors: the store's: a flat tensor per segment of the layout.
        carried: kept with the optimizer.
        parameter_map: None for the automatic one or, where there is none, PyTorch's own names.
        settle: takes the scalars over once everything else is set.
    """

    framework = "torch"
    form = "momentum"

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        config: SlowMoConfig,
        plan: Plan,
        groups: Groups,
        vectors: Vectors,
        progress: Progress,
        graph: str | None,
        carried: Carried,
        parameter_map: ParameterMap | None,
        settle: Callable[[Progress], None],
    ) -> None:
        self._model, self._base, self._vectors, self._settle = model, base, vectors, settle
        self.config, self.graph, self.carried = config, graph, carried
        self.progress = Progress(*map(np.asarray, progress))
        self.vectors = list(vectors)
        self._tensors = tensors_of(model)
        self.named = named(model, parameter_map)
        self._groups = groups
        self._places: dict[str, list[tuple[int, int, View]]] = {}
        self.groups: dict[str, int] = {}
        for number, (segment, places) in enumerate(zip(plan.layout.segments, plan.places, strict=True)):
            if segment.rule == "slow":
                for entry, start, place in zip(segment.entries, segment.offsets, places, strict=False):
                    self._places.setdefault(place.own, []).append((number, start, place.view))
                    self.groups[place.own] = entry.group
        lacking = set(self.groups) - {entry.own for entry in self.named.entries}
        if lacking:
            raise ValueError(f"the ParameterMap leaves out what is trained: {', '.join(sorted(lacking))}.")
        rates = [base.param_groups[own]["lr"] for own in groups.own]
        self.rates = np.array(list(map(float, rates)))
        self.rate_types = [array_of(x).dtype if isinstance(x, torch.Tensor) else np.dtype(float) for x in rates]
        self.kind = _kind(base)
        self.keeps = _keeps(base, self.kind)

    def read(self, vector: str, own: str) -> NDArray[Any]:
        if vector == "model":
            return array_of(self._tensors[own])
        parts = [(view, array_of(flat)) for view, flat in self._flats(vector, own)]
        found: NDArray[Any] = np.zeros(tuple(self._tensors[own].shape), parts[0][1].dtype)
        for view, flat in parts:
            found = view.to_own(flat.reshape(view.wire), found)
        return found

    def write(self, vector: str, own: str, value: NDArray[Any]) -> None:
        with torch.no_grad():
            if vector == "model":
                self._tensors[own].copy_(torch.tensor(value))
                return
            for view, flat in self._flats(vector, own):
                flat.copy_(torch.tensor(view.to_wire(value).reshape(-1)))

    def _flats(self, vector: str, own: str) -> Iterator[tuple[View, torch.Tensor]]:
        """What the views show of a parameter, flat as the vector has it."""
        for number, start, view in self._places[own]:
            whole = self._vectors[vector][number]
            assert whole is not None, "slow segments have every vector"
            yield view, whole[start : start + view.size]

    def base(self) -> Buffers:
        if self.kind not in ALIKE:
            return self._own_buffers()
        found: Buffers = {}
        for own, state in self._states().items():
            for key, theirs in _KEYS[self.kind].items():
                value = state.get(theirs)
                if value is not None:
                    array = np.asarray(int(value), dtype=np.int64) if key == "steps" else array_of(value)
                    found.setdefault(key, {})[own] = array
        return found

    def _own_buffers(self) -> Buffers:
        found: Buffers = {}
        for own, state in self._states().items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    found.setdefault(key, {})[own] = array_of(value)
                elif value is not None:
                    raise ValueError(
                        f"{type(self._base).__name__} keeps {key!r} as {type(value).__name__}, and a checkpoint holds "
                        "tensors only. Save state_dict() of every rank instead."
                    )
        return found

    def _states(self) -> dict[str, dict[str, Any]]:
        return {
            own: self._base.state[self._tensors[own]] for own in self.groups if self._tensors[own] in self._base.state
        }

    def prepare_base(self, buffers: Buffers, step: int) -> Callable[[], None]:
        base = self._base
        if not buffers:
            # Without state there is nothing to bring back, whether or not the class can be made anew.
            start = {} if self.kind in ALIKE or not base.state else base_state.fresh(base).state
            return lambda: base_state.replace(base, start)
        states = self._given_states(buffers)
        if self.kind not in ALIKE:
            self._check_buffers(buffers)

        def commit() -> None:
            groups = base.param_groups
            base.load_state_dict({**base.state_dict(), "state": states})
            base.param_groups = groups  # loading copies them, and schedulers may hold a rate that is a tensor

        return commit

    def _given_states(self, buffers: Buffers) -> dict[int, dict[str, torch.Tensor]]:
        """As a state_dict has them, by the parameters' numbers."""
        keys = _KEYS.get(self.kind, {})
        numbers = {id(p): n for n, p in enumerate(p for group in self._base.param_groups for p in group["params"])}
        states: dict[int, dict[str, torch.Tensor]] = {}
        for key, values in buffers.items():
            for own, value in values.items():
                if own not in self._places:
                    raise ValueError(f"the checkpoint has {key} of {own}, which this optimizer does not train.")
                scalar = self.kind in ALIKE and key == "steps"
                tensor = torch.tensor(float(value)) if scalar else torch.tensor(value)
                states.setdefault(numbers[id(self._tensors[own])], {})[keys.get(key, key)] = tensor
        return states

    def _check_buffers(self, buffers: Buffers) -> None:
        """Refuse what the base optimizer would not find, or not know, at its next step."""
        keeps = base_state.kept(self._base)
        if keeps is None:
            return
        for own in self.groups:
            given, expected = {key for key in buffers if own in buffers[key]}, keeps[id(self._tensors[own])]
            if given and given != expected:  # a parameter without a gradient has none yet
                raise CheckpointError(
                    f"the base optimizer has {', '.join(sorted(given))} of {own} in the checkpoint, and keeps "
                    f"{', '.join(sorted(expected)) or 'nothing'} here. Give it the settings of the run that is resumed."
                )

    def rest(self) -> Arrays:
        on_wire = {entry.own for entry in self.named.entries}
        kept = self._model.state_dict(keep_vars=True)
        return {own: array_of(x) for own, x in self._tensors.items() if own not in on_wire and own in kept}

    def finish(self, progress: Progress, rates: NDArray[Any], rest: Mapping[str, NDArray[Any]]) -> None:
        for own, value in rest.items():
            self.write("model", own, value)
        for number, group in enumerate(self._base.param_groups):
            common = self._groups.common(number)
            if common is None:
                continue
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rates[common])
            else:
                group["lr"] = float(rates[common])
        self._settle(progress)


def named(model: nn.Module, parameter_map: ParameterMap | None) -> Named:
    """The model's tensors on the wire or, if they can't be put there and no map was given, by PyTorch's own names."""
    try:
        return Named(tuple(entries_torch(model, parameter_map)))
    except ValueError as error:
        if parameter_map is not None:
            raise
        entries = []
        trained, kept = dict(model.named_parameters()), model.state_dict(keep_vars=True)
        for own, tensor in tensors_of(model).items():
            if tensor.is_floating_point() and (own in trained or own in kept):
                shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
                rule = "mean" if own not in trained else "slow" if tensor.requires_grad else "frozen"
                entries.append(TensorSpec(own, rule, shape, dtype, View.same(shape), own))
        return Named(tuple(entries), "torch", str(error))


def _kind(base: Optimizer) -> str:
    maximizes = any(group.get("maximize") for group in base.param_groups)
    if type(base) is torch.optim.SGD and not maximizes and not any(g["dampening"] for g in base.param_groups):
        return SGD
    if type(base) in (torch.optim.Adam, torch.optim.AdamW) and not maximizes:
        return ADAM
    return f"torch.{type(base).__name__}"


def _keeps(base: Optimizer, kind: str) -> list[str]:
    groups = base.param_groups
    if kind == SGD:
        return ["momentum"] if any(group["momentum"] for group in groups) else []
    if kind == ADAM:
        return ["moment1", "moment2", "steps", *(["moment2_max"] if any(g["amsgrad"] for g in groups) else [])]
    return []
