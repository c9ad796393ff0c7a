"""A Keras worker's state for checkpoints: its variables by their paths, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hvd_slowmo.checkpoint.file import Arrays
from hvd_slowmo.checkpoint.inner_state import ADAM, SGD, OptimizerKind, OptimizerState
from hvd_slowmo.checkpoint.naming import NamedTensors, name_tensors
from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.core.parts.slices import OwnSlices
from hvd_slowmo.core.parts.whole import Whole
from hvd_slowmo.core.start.graph import Graph
from hvd_slowmo.errors import CheckpointError
from hvd_slowmo.wire.parameter_map import Framework, ParameterMap
from hvd_slowmo.wire.tensors import Role, TensorSpec
from hvd_slowmo.wire.views import View
from hvd_slowmo_tf.inner_optimizer import InnerOptimizer
from hvd_slowmo_tf.interop.layers import entries_keras
from hvd_slowmo_tf.interop.weights import array_of
from hvd_slowmo_tf.model.layout import KerasLayout, common_path, parts_of
from hvd_slowmo_tf.model.variables import OptimizerVariables

_AVERAGE = "average"  # the moving average of the weights

Stretches = list[tuple[int, int, int]]
"""Stretches of the flat variables that a vector has per chunk of parameters: (number, from, to)."""


@dataclass(frozen=True)
class OptimizerParts:
    """The parts of a built optimizer that a checkpoint reads and writes."""

    inner: InnerOptimizer
    variables: OptimizerVariables
    layout: KerasLayout
    graph: Graph | None  # of the gossip
    rank: int  # place of this worker in the job
    workers: int  # number of workers of the job
    slices: OwnSlices


class KerasWorkerState:
    """`hvd_slowmo.checkpoint.state.WorkerState` of a SlowMo optimizer that has been built.

    Args:
        optimizer: SlowMo.
        parts: of it.
        model: a Keras model; or variables, which are named by their order then.
        parameter_map: None for the automatic one or, where there is none, the order of the variables.
        gathered: vectors that are kept in slices, for a save.
        entered: of the variable of this name, for a save.

    Raises:
        ValueError: the model or its map lacks trained variables.
    """

    framework: Framework = "keras"

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        parts: OptimizerParts,
        model: keras.Model | Sequence[keras.Variable],
        parameter_map: ParameterMap | None,
        gathered: Whole | None = None,
        entered: int = -1,
    ) -> None:
        self._parts, self._gathered, self._entered = parts, gathered, entered
        self._optimizer, self._inner, self._kept = optimizer, parts.inner, parts.variables
        self._rank, self._workers = parts.rank, parts.workers
        self.config = optimizer.config
        self.graph = None if parts.graph is None else parts.graph.digest
        self.progress = parts.variables.now
        trained = optimizer._trainable_variables
        variables = _variables_of(model)
        self.tensors, self._variables = _name(model, variables, trained, parameter_map)
        named = {id(v) for v in self._variables.values()}
        self._others = {f"{n}.{common_path(v.path)}": v for n, v in enumerate(variables) if id(v) not in named}
        names = {id(v): own for own, v in self._variables.items()}
        missing = [v.path for v in trained if id(v) not in names]
        if missing:
            raise ValueError(f"the optimizer trains variables that the model or its map lacks: {', '.join(missing)}.")
        self._trained = [names[id(v)] for v in trained]
        self._flats: dict[tuple[str, int], NDArray[Any]] = {}  # by vector and number
        self._changed: set[tuple[str, int]] = set()
        self._averages: dict[str, keras.Variable] = {}
        if optimizer.use_ema:
            self._averages = dict(zip(self._trained, optimizer._model_variables_moving_average, strict=True))
        kept = [vector for vector in parts.variables.vectors if vector != "in_flight"]
        self.vectors = [*kept, *([_AVERAGE] if optimizer.use_ema else [])]
        self.groups, self._places = _places(parts, names)
        self.groups = dict.fromkeys(self._trained, 0) | self.groups  # variables without elements may not be laid out
        residuals = self._kept.slices.get("slice_residual", {})
        self.slice_residuals = {str(chunk): array_of(v) for chunk, v in residuals.items()}
        self.averaged = set(self._trained) | {spec.own for spec in self.tensors.specs if spec.role == "statistic"}
        rate = float(array_of(optimizer._get_current_learning_rate()))
        self.rates = np.full(parts.layout.layout.group_count, rate)
        self.optimizer = kind_of(parts.inner.innermost)

    def read(self, vector: str, own: str) -> NDArray[Any]:
        if not self._in_flat_variables(vector, own):
            return array_of(self._whole(vector, own))
        v = self._variables[own]
        dtype = np.float64 if keras.backend.standardize_dtype(v.dtype) == "float64" else np.float32
        whole: NDArray[Any] = np.zeros(tuple(v.shape), dtype)
        for view, stretches in self._places.get(own, ()):
            flat = [self._flat(vector, number)[start:stop] for number, start, stop in stretches]
            if flat:
                whole = view.to_own(np.concatenate(flat).reshape(view.wire), whole)
        return whole

    def write(self, vector: str, own: str, value: NDArray[Any]) -> None:
        if not self._in_flat_variables(vector, own):
            if vector != "in_flight":
                self._whole(vector, own).assign(value)
            return
        for view, stretches in self._places.get(own, ()):
            flat = view.to_wire(value).reshape(-1)
            for number, start, stop in stretches:
                self._flat(vector, number)[start:stop] = flat[: stop - start]
                self._changed.add((vector, number))
                flat = flat[stop - start :]

    def _in_flat_variables(self, vector: str, own: str) -> bool:
        """Return whether a vector has this tensor. Statistics in flight are no state: they are sent as they are."""
        return vector in self._kept.vectors and (vector != "in_flight" or own in self._places)

    def _flat(self, vector: str, number: int) -> NDArray[Any]:
        """Return a flat variable's values. `finish` assigns them whole: a variable assigned in part gets slow."""
        if (vector, number) not in self._flats:
            self._flats[vector, number] = self._present(vector, number)
        return self._flats[vector, number]

    def _present(self, vector: str, number: int) -> NDArray[Any]:
        """Return a copy of a chunk of a vector; zeros of one that is in slices, but for a save."""
        if not self._parts.slices.keeps(vector, number):
            present: NDArray[Any] = array_of(self._kept.vectors[vector][number]).copy()
            return present
        if self._gathered:
            return array_of(self._gathered[vector][number])
        return np.zeros(self._parts.layout.layout.chunks[number].size, self._kept.slices[vector][number].dtype)

    def _whole(self, vector: str, own: str) -> keras.Variable:
        return self._averages[own] if vector == _AVERAGE else self._variables[own]

    def read_optimizer(self) -> OptimizerState:
        count = self._optimizer.gradient_accumulation_steps
        if count and int(self._optimizer._iterations) % count:
            raise CheckpointError(
                "gradients are waiting for others to be accumulated, and a checkpoint does not hold them. Save after a "
                f"multiple of gradient_accumulation_steps={count} calls."
            )
        innermost = self._inner.innermost
        if not self.optimizer.alike:
            return {"variables": {name: array_of(v) for name, v in self._own_state().items()}}
        if not int(innermost.iterations):
            return {}
        buffers = {
            key: {own: array_of(v) for own, v in zip(self._trained, variables, strict=True)}
            for key, variables in _buffers(innermost).items()
        }
        if self.optimizer.name == ADAM:
            steps = np.asarray(int(innermost.iterations), dtype=np.int64)
            buffers["steps"] = dict.fromkeys(self._trained, steps)
        return buffers

    def _own_state(self) -> dict[str, keras.Variable]:
        """Return the inner optimizer's state by number: Keras counts up the numbers in the variables' names."""
        return {str(number): v for number, v in enumerate(self._inner.state)}

    def prepare_optimizer(self, state: OptimizerState, step: int) -> Callable[[], None]:
        if not self.optimizer.alike:
            return self._prepare_own_state(state.get("variables", {}))
        buffers = _buffers(self._inner.innermost)
        iterations = step if state else 0
        if self.optimizer.name == ADAM and state:
            iterations = self._common_step(state.get("steps", {}))

        def commit() -> None:
            for key, variables in buffers.items():
                values = state.get(key, {})
                for own, v in zip(self._trained, variables, strict=True):
                    v.assign(values.get(own, np.zeros(v.shape)))
            self._inner.innermost._iterations.assign(iterations)

        return commit

    def _common_step(self, steps: Mapping[str, NDArray[Any]]) -> int:
        counts = {own: int(steps[own]) if own in steps else 0 for own in self._trained}
        if len(set(counts.values())) > 1:
            least = min(counts, key=counts.__getitem__)
            raise CheckpointError(
                f"PyTorch's Adam has counted {counts[least]} steps of {least} and {max(counts.values())} of others, "
                "and Keras has one count for all."
            )
        return next(iter(counts.values()))

    def _prepare_own_state(self, values: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        state = self._own_state()
        if not values:  # the state from before the first step
            if int(self._inner.innermost.iterations) and self.config.inner_state != "reset":
                raise CheckpointError("this optimizer has made steps. Load into one that has not.")
            return self._inner.reset
        for name, v in state.items():
            like = array_of(v)
            if name not in values or (values[name].shape, values[name].dtype) != (like.shape, like.dtype):
                raise CheckpointError(
                    f"the checkpoint lacks the inner optimizer's variable {name}, {like.dtype} of shape {like.shape}. "
                    "Give it the settings of the run that is resumed."
                )

        def commit() -> None:
            for name, v in state.items():
                v.assign(values[name])

        return commit

    def read_framework(self) -> Arrays:
        arrays = {name: array_of(v) for name, v in self._of_keras().items()}
        return {**arrays, "entered": np.asarray(self._entered)}

    def _of_keras(self) -> dict[str, keras.Variable]:
        scaler, found = self._inner.optimizer, {**self._others, "entered": self._kept.entered}
        if scaler is not self._inner.innermost:
            found["loss_scale.step_counter"] = scaler.step_counter
            found["loss_scale.dynamic_scale"] = scaler.dynamic_scale
        return found

    def finish(self, progress: Progress, rates: NDArray[np.float64], framework: Mapping[str, NDArray[Any]]) -> None:
        for vector, number in self._changed:
            whole = self._flats[vector, number]
            if self._parts.slices.keeps(vector, number):
                v, chunk = self._kept.slices[vector][number], self._parts.layout.layout.chunks[number]
                own = self._parts.slices.cut(chunk, whole)
                v.assign(np.pad(own, (0, v.shape[0] - len(own))))
            else:
                self._kept.vectors[vector][number].assign(whole)
        for index, v in self._kept.slices.get("slice_residual", {}).items():
            v.assign(self.slice_residuals.get(str(index), np.zeros(v.shape, np.float32)))
        self._kept.entered.assign(-1)  # another framework's checkpoint has no word on it
        others = self._of_keras()
        for name, value in framework.items():
            others[name].assign(value)
        optimizer = self._optimizer
        if isinstance(optimizer._learning_rate, keras.Variable):  # a schedule follows the count of steps
            optimizer._learning_rate.assign(rates[0])
        if optimizer.gradient_accumulation_steps:  # drop the micro-batches of the training that was here before
            for v in optimizer._accumulated_gradients:
                v.assign(np.zeros(v.shape))
        optimizer._iterations.assign(progress.step * (optimizer.gradient_accumulation_steps or 1))
        self._kept.write(progress)
        self._kept.belong_to(self._rank, self._workers)


def name_model(
    model: keras.Model, parameter_map: ParameterMap | None
) -> tuple[NamedTensors, dict[str, keras.Variable]]:
    """Return a model's tensors by the names of the wire or, if they can't have them and no map was given, by order.

    Returns:
        The tensors, and the variables by the tensors' own names.

    Raises:
        ValueError: a variable can't travel, with a map.

    Example:
        >>> layers = [keras.Input((2,)), keras.layers.PReLU(name="p")]
        >>> tensors, variables = name_model(keras.Sequential(layers, name="model"), None)
        >>> tensors.naming, list(variables)
        ('keras', ['0.model/p/alpha'])
    """
    return _name(model, _variables_of(model), model.trainable_variables, parameter_map)


def kind_of(innermost: keras.optimizers.Optimizer) -> OptimizerKind:
    """Return the kind of an inner optimizer that has been built.

    Example:
        >>> kind_of(keras.optimizers.RMSprop()).name
        'keras.RMSprop'
    """
    if type(innermost) is keras.optimizers.SGD:
        return OptimizerKind.sgd("velocity", momentum=bool(innermost.momentums))
    if type(innermost) in (keras.optimizers.Adam, keras.optimizers.AdamW):
        return OptimizerKind.adam(amsgrad=innermost.amsgrad)
    return OptimizerKind.other("keras", innermost)


def _buffers(innermost: keras.optimizers.Optimizer) -> dict[str, Sequence[keras.Variable]]:
    """Return the variables of each buffer of an optimizer of an alike kind, in the order of the trained variables."""
    if kind_of(innermost).name == SGD:
        return {"velocity": innermost.momentums} if innermost.momentums else {}
    moments = {"moment1": innermost._momentums, "moment2": innermost._velocities}
    return {**moments, "moment2_max": innermost._velocity_hats} if innermost.amsgrad else moments


def _variables_of(model: keras.Model | Sequence[keras.Variable]) -> list[keras.Variable]:
    return parts_of(model)[0] if isinstance(model, keras.Model) else list(model)


def _name(
    model: keras.Model | Sequence[keras.Variable],
    variables: Sequence[keras.Variable],
    trained: Sequence[keras.Variable],
    parameter_map: ParameterMap | None,
) -> tuple[NamedTensors, dict[str, keras.Variable]]:
    by_path = {v.path: v for v in variables}
    ordered: dict[str, keras.Variable] = {}

    def on_wire() -> list[TensorSpec]:
        if isinstance(model, keras.Model):
            return entries_keras(model, parameter_map)
        if parameter_map is not None:
            raise TypeError("a ParameterMap needs the Keras model. Give it as `model`.")
        raise ValueError("only the variables were given, and not the Keras model.")

    def by_order() -> Iterator[TensorSpec]:
        trained_ids = {id(v) for v in trained}
        for number, v in enumerate(variables):
            if tf.as_dtype(v.dtype).is_floating:
                # Keras numbers names that it has seen before, in the order in which models were built.
                own, shape = f"{number}.{common_path(v.path)}", tuple(v.shape)
                untrained: Role = "statistic" if v.name.startswith("moving_") else "frozen"
                role = "parameter" if id(v) in trained_ids else untrained
                ordered[own] = v
                yield TensorSpec(own, role, shape, tf.as_dtype(v.dtype).name, View.same(shape), own)

    tensors = name_tensors("keras", parameter_map, on_wire, by_order)
    if tensors.naming == "wire":
        return tensors, {spec.own: by_path[spec.own] for spec in tensors.specs}
    return tensors, ordered


def _places(
    parts: OptimizerParts, names: Mapping[int, str]
) -> tuple[dict[str, int], dict[str, list[tuple[View, Stretches]]]]:
    """Return the group of each trained variable, and the places of its elements in a vector, in their order.

    Args:
        names: by id of a variable.
    """
    layout, groups = parts.layout.layout, iter(parts.layout.layout.groups)
    group_of: dict[str, int] = {}
    places: dict[str, list[tuple[View, Stretches]]] = {}
    stretches: dict[tuple[int, int], Stretches] = {}
    for segment, refs in enumerate(parts.layout.refs):
        if layout.segments[segment].role == "parameter":
            for number, ref in enumerate(refs):
                own = names[id(ref.variable)]
                group_of[own] = next(groups)
                stretches[segment, number] = []
                places.setdefault(own, []).append((ref.spec.view, stretches[segment, number]))
    for chunk in layout.parameter_chunks:
        for number, start, stop, at in layout.spans(chunk):
            stretches[chunk.segment, number].append((chunk.index, at, at + stop - start))
    return group_of, places
