"""A PyTorch worker's state for checkpoints: its tensors by their names, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from hvd_slowmo.checked_numbers import real
from hvd_slowmo.checkpoint.file import Arrays
from hvd_slowmo.checkpoint.inner_state import ADAM, SETTINGS, SGD, OptimizerKind, OptimizerState, check_buffers
from hvd_slowmo.checkpoint.naming import NamedTensors, name_tensors
from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.core.parts.whole import Whole, divided_vectors
from hvd_slowmo.core.step.assembly import Assembly
from hvd_slowmo.errors import CheckpointError
from hvd_slowmo.wire.parameter_map import Framework, ParameterMap
from hvd_slowmo.wire.tensors import Role, TensorSpec
from hvd_slowmo.wire.views import View
from hvd_slowmo_torch.inner import inner_optimizer as inner_state
from hvd_slowmo_torch.inner import inner_settings
from hvd_slowmo_torch.inner.saved_inner import check_saved
from hvd_slowmo_torch.interop.layers import entries_torch
from hvd_slowmo_torch.interop.weights import array_of, tensors_of
from hvd_slowmo_torch.model.watch import WatchNotes

if TYPE_CHECKING:
    from hvd_slowmo_torch.model.layout import TensorRef
    from hvd_slowmo_torch.model.store import TorchStore

_KEYS = {
    SGD: {"momentum": "momentum_buffer"},
    ADAM: {"moment1": "exp_avg", "moment2": "exp_avg_sq", "moment2_max": "max_exp_avg_sq", "steps": "step"},
}
"""PyTorch's names of the buffers of the kinds that both frameworks define alike."""

_WATCH = tuple(f"watch/{field}" for field in WatchNotes._fields)
"""The watch's notes among the state of PyTorch alone; parameters in the order of the model's tensors."""


class TorchWorkerState:
    """`hvd_slowmo.checkpoint.state.WorkerState` of a SlowMo optimizer.

    Args:
        assembly: the optimizer's parts, whose store is a TorchStore.
        progress: the scalar state.
        parameter_map: None for the automatic one or, where there is none, PyTorch's own names.
        take_over: takes the scalars and the watch's notes over once everything else is set.

    Raises:
        ValueError: the map leaves out trained parameters.
    """

    framework: Framework = "torch"

    def __init__(
        self,
        model: nn.Module,
        inner_optimizer: Optimizer,
        assembly: Assembly[TensorRef],
        progress: Progress,
        parameter_map: ParameterMap | None,
        take_over: Callable[[Progress, WatchNotes | None], None],
        whole: Whole | None = None,
    ) -> None:
        self._model, self._inner, self._take_over = model, inner_optimizer, take_over
        self._common_groups = assembly.groups
        store = cast("TorchStore", assembly.runtime.store)
        self._store, self._watch = store, store.watch
        self._tensors = tensors_of(model)
        self._places: dict[str, list[tuple[int, int, View]]] = {}  # segment, start, view; by own name
        self.config = assembly.runtime.config
        self._late = self.config.delay > 0
        self._slices = assembly.runtime.slices
        self.graph = None if assembly.graph is None else assembly.graph.digest
        self.progress = Progress.from_flat({field: np.asarray(x) for field, x in progress.flat().items()})
        self.vectors = list(store.vectors)
        self.tensors = name_model(model, parameter_map)
        self.groups: dict[str, int] = {}
        layout = assembly.layout.layout
        groups = iter(layout.groups)
        for number, segment in enumerate(layout.segments):
            for spec, start in zip(segment.tensors, segment.offsets, strict=False):
                if segment.role != "optimizer_state":
                    self._places.setdefault(spec.own, []).append((number, start, spec.view))
                if segment.role == "parameter":
                    self.groups[spec.own] = next(groups)
        self.averaged = set(self._places)
        # As whole segments, so that a resume may write tensor by tensor.
        self._sent = [store.whole_in_flight(number) for number in range(len(layout.segments))] if self._late else []
        self._flats = dict(store.vectors)
        for name in divided_vectors(self.config):
            flats = self._flats[name] = list(self._flats[name])
            for number, segment in enumerate(layout.segments):
                if segment.sliced:  # in host memory: whole vectors need not fit on the device
                    flats[number] = torch.zeros(segment.size, dtype=getattr(torch, segment.dtype))
            for chunk in self._slices.chunks if whole is not None else ():
                flat = flats[chunk.segment]
                assert flat is not None, "made above"
                assert whole is not None, "else there is no chunk"
                flat[chunk.start : chunk.stop] = torch.from_numpy(whole[name][chunk.index])
        missing = set(self.groups) - {spec.own for spec in self.tensors.specs}
        if missing:
            raise ValueError(f"the ParameterMap leaves out trained parameters: {', '.join(sorted(missing))}.")
        for number, group in enumerate(inner_optimizer.param_groups):
            real(f"param_groups[{number}]['lr']", group["lr"], lambda rate: rate >= 0, "a finite number >= 0")
        self.rates = np.array([float(inner_optimizer.param_groups[own]["lr"]) for own in assembly.groups.own])
        self.optimizer = kind_of(inner_optimizer)
        residuals = store.slices.get("slice_residual", {})
        self.slice_residuals = {str(chunk): array_of(value) for chunk, value in residuals.items()}

    def read(self, vector: str, own: str) -> NDArray[Any]:
        if vector == "model":
            return array_of(self._tensors[own])
        parts = [(view, array_of(flat)) for view, flat in self._parts(vector, own)]
        whole: NDArray[Any] = np.zeros(tuple(self._tensors[own].shape), parts[0][1].dtype)
        for view, flat in parts:
            whole = view.to_own(flat.reshape(view.wire), whole)
        return whole

    def write(self, vector: str, own: str, value: NDArray[Any]) -> None:
        with torch.no_grad():
            if vector == "model":
                self._tensors[own].copy_(torch.tensor(value))
                return
            for view, flat in self._parts(vector, own):
                flat.copy_(torch.tensor(view.to_wire(value).reshape(-1)))

    def _parts(self, vector: str, own: str) -> Iterator[tuple[View, torch.Tensor]]:
        """Yield the parts of a parameter that its views show, flat as the vector has them."""
        for number, start, view in self._places[own]:
            flat = self._sent[number] if vector == "in_flight" else self._flats[vector][number]
            assert flat is not None, "segments of parameters have every vector"
            yield view, flat[start : start + view.size]

    def read_optimizer(self) -> OptimizerState:
        buffers = self._read_alike_state() if self.optimizer.alike else self._read_own_state()
        settings = inner_settings.dump(self._inner)
        return buffers if settings is None else {**buffers, SETTINGS: {self.framework: settings}}

    def _read_alike_state(self) -> OptimizerState:
        buffers: OptimizerState = {}
        for own, state in self._states().items():
            for key, attribute in _KEYS[self.optimizer.name].items():
                value = state.get(attribute)
                if value is not None:
                    array = np.asarray(int(value), dtype=np.int64) if key == "steps" else array_of(value)
                    buffers.setdefault(key, {})[own] = array
        return buffers

    def _read_own_state(self) -> OptimizerState:
        buffers: OptimizerState = {}
        for own, state in self._states().items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    buffers.setdefault(key, {})[own] = array_of(value)
                elif value is not None:
                    raise CheckpointError(
                        f"{type(self._inner).__name__} keeps {key!r} as {type(value).__name__}, and a checkpoint holds "
                        "tensors only. Save state_dict() of every rank instead."
                    )
        return buffers

    def _states(self) -> dict[str, dict[str, Any]]:
        state = self._inner.state
        return {own: state[self._tensors[own]] for own in self.groups if self._tensors[own] in state}

    def prepare_optimizer(self, state: OptimizerState, step: int) -> Callable[[], None]:
        inner, buffers = self._inner, {key: values for key, values in state.items() if key != SETTINGS}
        set_settings = inner_settings.prepare(inner, state.get(SETTINGS, {}).get(self.framework))
        if not buffers:
            # Without state nothing is to be reset, and the class may be one that can't be made anew.
            start = {} if self.optimizer.alike or not inner.state else inner_state.fresh(inner).state

            def begin() -> None:
                inner_state.replace(inner, start)
                set_settings()

            return begin
        states = self._states_of(buffers)
        if not self.optimizer.alike:
            self._check_own_state(buffers)
        check_saved(inner, {**inner.state_dict(), "state": states})

        def commit() -> None:
            groups = inner.param_groups
            inner.load_state_dict({**inner.state_dict(), "state": states})
            inner.param_groups = groups  # loading copies them, and schedulers may hold a rate that is a tensor
            set_settings()

        return commit

    def _states_of(self, buffers: OptimizerState) -> dict[int, dict[str, torch.Tensor]]:
        """Return buffers in the form of a state_dict, by the parameters' numbers."""
        keys = _KEYS.get(self.optimizer.name, {})
        numbers = {id(p): n for n, p in enumerate(p for group in self._inner.param_groups for p in group["params"])}
        states: dict[int, dict[str, torch.Tensor]] = {}
        for key, values in buffers.items():
            for own, value in values.items():
                if own not in self._places:
                    raise CheckpointError(f"the checkpoint has {key} of {own}, which this optimizer does not train.")
                scalar = self.optimizer.alike and key == "steps"
                tensor = torch.tensor(float(value)) if scalar else torch.tensor(value)
                states.setdefault(numbers[id(self._tensors[own])], {})[keys.get(key, key)] = tensor
        return states

    def _check_own_state(self, buffers: OptimizerState) -> None:
        """Refuse state that the inner optimizer would miss, or not know, at its next step."""
        kept = inner_state.kept(self._inner)
        if kept is None:  # no step can tell
            return
        for own in self.groups:
            saved = {key for key in buffers if own in buffers[key]}
            if saved:  # a parameter without a gradient has none yet
                check_buffers(saved, kept[id(self._tensors[own])], own)

    def read_framework(self) -> Arrays:
        on_wire = {spec.own for spec in self.tensors.specs}
        persistent = self._model.state_dict(keep_vars=True)
        others = {own: array_of(x) for own, x in self._tensors.items() if own not in on_wire and own in persistent}
        return others | self._read_watch() | {name: flat.numpy() for name, flat in self._inner_in_flight().items()}

    def _inner_in_flight(self) -> dict[str, torch.Tensor]:
        """Return the inner optimizer's state that was sent and not averaged yet (inner_state="average"), by name."""
        segments = zip(self._store.layout.segments, self._sent, strict=False)
        return {
            f"in_flight/{number}": flat.cpu()
            for number, (segment, flat) in enumerate(segments)
            if segment.role == "optimizer_state"
        }

    def _read_watch(self) -> Arrays:
        order = self._trained()
        return {
            f"watch/{field}": np.array([value[own] for own in order] if isinstance(value, dict) else value)
            for field, value in self._watch.notes()._asdict().items()
        }

    def _trained(self) -> list[str]:
        """Return the trained parameters in the order of the model's tensors, whatever devices they are on."""
        return list(dict.fromkeys(spec.own for spec in self.tensors.specs if spec.own in self.groups))

    def _notes(self, framework: Mapping[str, NDArray[Any]]) -> WatchNotes | None:
        """Return the watch's notes; None in a checkpoint of another framework or of weights alone."""
        if not all(name in framework for name in _WATCH):
            return None
        order, values = self._trained(), [framework[name].tolist() for name in _WATCH]
        norms, held, moved, sent_moved = (dict(zip(order, each, strict=True)) for each in values[:4])
        return WatchNotes(norms, held, moved, sent_moved, *values[4:])

    def finish(self, progress: Progress, rates: NDArray[np.float64], framework: Mapping[str, NDArray[Any]]) -> None:
        for own, value in framework.items():
            if own.startswith("in_flight/"):
                self._sent[int(own.removeprefix("in_flight/"))].copy_(torch.tensor(value))
            elif own not in _WATCH:
                self.write("model", own, value)
        for index, residual in self._store.slices.get("slice_residual", {}).items():
            saved = self.slice_residuals.get(str(index))
            residual.copy_(torch.zeros_like(residual) if saved is None else torch.tensor(saved))
        for name in divided_vectors(self.config):
            for chunk in self._slices.chunks:
                flat = self._flats[name][chunk.segment]
                assert flat is not None, "segments in slices have one here"
                own = self._slices.cut(chunk, flat[chunk.start : chunk.stop])
                self._store.slices[name][chunk.index][: len(own)] = own
        if self._late:
            self._store.in_flight = {
                chunk.index: self._sent[chunk.segment][chunk.start : chunk.stop].clone()
                for chunk in self._store.layout.chunks
                if progress.flight.launched[chunk.fragment]
            }
        for number, group in enumerate(self._inner.param_groups):
            common = self._common_groups.common(number)
            if common is None:
                continue
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rates[common])
            else:
                group["lr"] = float(rates[common])
        self._take_over(progress, self._notes(framework))


def name_model(model: nn.Module, parameter_map: ParameterMap | None) -> NamedTensors:
    """Return a model's tensors by the names of the wire or, if they can't have them and no map was given, PyTorch's.

    Raises:
        ValueError: a tensor can't travel, with a map.

    Example:
        >>> name_model(nn.PReLU(), None).naming
        'torch'
    """

    def by_own_names() -> Iterator[TensorSpec]:
        parameters, persistent = dict(model.named_parameters()), model.state_dict(keep_vars=True)
        for own, tensor in tensors_of(model).items():
            if tensor.is_floating_point() and (own in parameters or own in persistent):
                trained: Role = "parameter" if tensor.requires_grad else "frozen"
                role = trained if own in parameters else "statistic"
                shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
                yield TensorSpec(own, role, shape, dtype, View.same(shape), own)

    return name_tensors("torch", parameter_map, lambda: entries_torch(model, parameter_map), by_own_names)


def kind_of(optimizer: Optimizer) -> OptimizerKind:
    """Return the kind of an inner optimizer.

    Example:
        >>> kind_of(torch.optim.AdamW(nn.Linear(2, 1).parameters())).name
        'adam'
    """
    groups = optimizer.param_groups
    maximizes = any(group.get("maximize") for group in groups)
    if type(optimizer) is torch.optim.SGD and not maximizes and not any(group["dampening"] for group in groups):
        return OptimizerKind.sgd("momentum", momentum=any(group["momentum"] for group in groups))
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and not maximizes:
        return OptimizerKind.adam(amsgrad=any(group["amsgrad"] for group in groups))
    return OptimizerKind.other("torch", optimizer)
