"""What `hvd_slowmo.checkpoint.job` needs of a Keras worker: its variables by their paths, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hvd_slowmo.checkpoint.file import Arrays, CheckpointError
from hvd_slowmo.checkpoint.inner_state import ADAM, ALIKE, SGD, Buffers, Carried
from hvd_slowmo.checkpoint.state import Named
from hvd_slowmo.core.progress import Progress
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo.wire.tensors import TensorSpec
from hvd_slowmo.wire.views import View
from hvd_slowmo_tf.inner_optimizer import Inner
from hvd_slowmo_tf.interop.layers import entries_keras
from hvd_slowmo_tf.interop.weights import array_of
from hvd_slowmo_tf.layout import Plan, common_path, parts_of, wire_dtype
from hvd_slowmo_tf.variables import State

_AVERAGE = "average"  # the moving average of the weights


class KerasSide:
    """`hvd_slowmo.checkpoint.state.Side` of a SlowMo optimizer that has been built.

    Args:
        model: a Keras model; or variables, which are named by their order then.
        plan: what travels.
        workers: of this job.
        parameter_map: None for the automatic one or, where there is none, the order of the variables.
    """

    framework = "keras"
    form = "velocity"

    def __init__(
        self,
        optimizer: Any,
        inner: Inner,
        state: State,
        model: Any,
        plan: Plan,
        workers: int,
        graph: str | None,
        carried: Carried,
        parameter_map: ParameterMap | None,
    ) -> None:
        self._optimizer, self._inner, self._state, self._workers = optimizer, inner, state, workers
        self.config, self.graph, self.carried = optimizer.config, graph, carried
        self.progress = state.now
        given = parts_of(model)[0] if isinstance(model, keras.Model) else list(model)
        self.named, self._variables = _named(model, given, optimizer._trainable_variables, parameter_map)
        on_wire = {id(v) for v in self._variables.values()}
        self._others = {f"{n}.{common_path(v.path)}": v for n, v in enumerate(given) if id(v) not in on_wire}
        own = {id(v): name for name, v in self._variables.items()}
        lacking = [v.path for v in optimizer._trainable_variables if id(v) not in own]
        if lacking:
            raise ValueError(f"the optimizer trains what the model or its ParameterMap lacks: {', '.join(lacking)}.")
        self._trained = [own[id(v)] for v in optimizer._trainable_variables]
        laid, self._places = _places(plan, own, state)
        self.groups = dict.fromkeys(self._trained, 0) | laid  # what has no element may not be laid out
        self._flats: dict[int, NDArray[Any]] = {}  # by id of a flat variable
        self._changed: dict[int, Any] = {}
        self._averages: dict[str, Any] = {}
        if optimizer.use_ema:
            self._averages = dict(zip(self._trained, optimizer._model_variables_moving_average, strict=True))
        self.vectors = [*state.vectors, *([_AVERAGE] if optimizer.use_ema else [])]
        rate = array_of(optimizer._get_current_learning_rate())
        self.rates = np.full(plan.layout.groups, float(rate))
        self.rate_types = [rate.dtype] * plan.layout.groups
        self.kind = _kind(inner.innermost)
        self.keeps = [*_buffers(inner.innermost, self.kind), *(["steps"] if self.kind == ADAM else [])]

    def read(self, vector: str, own: str) -> NDArray[Any]:
        if vector not in self._places:
            return array_of(self._whole(vector, own))
        v = self._variables[own]
        found: NDArray[Any] = np.zeros(tuple(v.shape), wire_dtype(tf.as_dtype(v.dtype)).as_numpy_dtype)
        for view, stretches in self._places[vector].get(own, ()):
            flat = [self._flat(kept)[start:stop] for kept, start, stop in stretches]
            if flat:
                found = view.to_own(np.concatenate(flat).reshape(view.wire), found)
        return found

    def write(self, vector: str, own: str, value: NDArray[Any]) -> None:
        if vector not in self._places:
            self._whole(vector, own).assign(value)
            return
        for view, stretches in self._places[vector].get(own, ()):
            flat = view.to_wire(value).reshape(-1)
            for kept, start, stop in stretches:
                self._flat(kept)[start:stop] = flat[: stop - start]
                self._changed[id(kept)] = kept
                flat = flat[stop - start :]

    def _flat(self, v: Any) -> NDArray[Any]:
        """A flat variable's values. They are assigned whole, in `finish`: one that is assigned in part gets slow."""
        if id(v) not in self._flats:
            self._flats[id(v)] = v.numpy().copy()
        return self._flats[id(v)]

    def _whole(self, vector: str, own: str) -> Any:
        return self._averages[own] if vector == _AVERAGE else self._variables[own]

    def base(self) -> Buffers:
        count = self._optimizer.gradient_accumulation_steps
        if count and int(self._optimizer._iterations) % count:
            raise CheckpointError(
                "there are gradients that wait for others to be accumulated, which a checkpoint does not hold. Save "
                f"after a multiple of gradient_accumulation_steps={count} calls."
            )
        innermost = self._inner.innermost
        if self.kind not in ALIKE:
            return {"variables": {name: array_of(v) for name, v in self._own_variables().items()}}
        if not int(innermost.iterations):
            return {}
        found = {
            key: {own: array_of(v) for own, v in zip(self._trained, variables, strict=True)}
            for key, variables in _buffers(innermost, self.kind).items()
        }
        if self.kind == ADAM:
            steps = np.asarray(int(innermost.iterations), dtype=np.int64)
            found["steps"] = dict.fromkeys(self._trained, steps)
        return found

    def _own_variables(self) -> dict[str, Any]:
        innermost = self._inner.innermost
        kept = [v for v in innermost.variables if v is not innermost._learning_rate]
        return {str(number): v for number, v in enumerate(kept)}  # their names have numbers that Keras counts up

    def prepare_base(self, buffers: Buffers, step: int) -> Callable[[], None]:
        if self.kind not in ALIKE:
            return self._prepare_own(buffers.get("variables", {}))
        places = _buffers(self._inner.innermost, self.kind)
        iterations = step if buffers else 0
        if self.kind == ADAM and buffers:
            iterations = self._common_step(buffers.get("steps", {}))

        def commit() -> None:
            for key, variables in places.items():
                values = buffers.get(key, {})
                for own, v in zip(self._trained, variables, strict=True):
                    v.assign(values.get(own, np.zeros(v.shape)))
            self._inner.innermost._iterations.assign(iterations)

        return commit

    def _common_step(self, steps: Mapping[str, NDArray[Any]]) -> int:
        found = {own: int(steps[own]) if own in steps else 0 for own in self._trained}
        if len(set(found.values())) > 1:
            odd = min(found, key=found.__getitem__)
            raise CheckpointError(
                f"PyTorch's Adam has counted {found[odd]} steps of {odd} and {max(found.values())} of others, and "
                "Keras has one count for all."
            )
        return next(iter(found.values()))

    def _prepare_own(self, values: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
        own = self._own_variables()
        if not values:  # as before the first step
            if int(self._inner.innermost.iterations) and self.config.buffers != "reset":
                raise CheckpointError("this optimizer has made steps. Load into one that has not.")
            return self._inner.reset
        for name, v in own.items():
            if name not in values or values[name].shape != tuple(v.shape):
                raise CheckpointError(
                    f"the checkpoint lacks the base optimizer's variable {name} of shape {tuple(v.shape)}."
                )

        def commit() -> None:
            for name, v in own.items():
                v.assign(values[name])

        return commit

    def rest(self) -> Arrays:
        return {name: array_of(v) for name, v in {**self._others, **self._scaler()}.items()}

    def _scaler(self) -> dict[str, Any]:
        scaler = self._inner.optimizer
        if scaler is self._inner.innermost:
            return {}
        return {"loss_scale.step_counter": scaler.step_counter, "loss_scale.dynamic_scale": scaler.dynamic_scale}

    def finish(self, progress: Progress, rates: NDArray[Any], rest: Mapping[str, NDArray[Any]]) -> None:
        for v in self._changed.values():
            v.assign(self._flat(v))
        others = {**self._others, **self._scaler()}
        for name, value in rest.items():
            others[name].assign(value)
        optimizer = self._optimizer
        if isinstance(optimizer._learning_rate, keras.Variable):  # a schedule follows the count of steps
            optimizer._learning_rate.assign(rates[0])
        if optimizer.gradient_accumulation_steps:  # micro-batches of the training that was here before
            for v in optimizer._accumulated_gradients:
                v.assign(np.zeros(v.shape))
        optimizer._iterations.assign(progress.step * (optimizer.gradient_accumulation_steps or 1))
        self._state.write(progress)
        self._state.workers.assign(self._workers)


def named_variables(model: Any, parameter_map: ParameterMap | None) -> tuple[Named, dict[str, Any]]:
    """A Keras model's tensors on the wire or, if they can't be put there and no map was given, by their order.

    Returns:
        The names, and the variables by the entries' own names.
    """
    return _named(model, parts_of(model)[0], model.trainable_variables, parameter_map)


def _named(
    model: Any, given: Sequence[Any], trained: Sequence[Any], parameter_map: ParameterMap | None
) -> tuple[Named, dict[str, Any]]:
    """The tensors on the wire or, if they can't be put there and no map was given, variables by their order."""
    why = "only the variables were given, and not the Keras model."
    if isinstance(model, keras.Model):
        try:
            entries = entries_keras(model, parameter_map)
            by_path = {v.path: v for v in given}
            return Named(tuple(entries)), {entry.own: by_path[entry.own] for entry in entries}
        except ValueError as error:
            if parameter_map is not None:
                raise
            why = str(error)
    elif parameter_map is not None:
        raise TypeError("a ParameterMap needs the Keras model. Give it as `model`.")
    ours, found, variables = {id(v) for v in trained}, [], {}
    for number, v in enumerate(given):
        if tf.as_dtype(v.dtype).is_floating:
            # Keras numbers names that it has seen before, in the order in which models were built.
            own, shape = f"{number}.{common_path(v.path)}", tuple(v.shape)
            rule = "slow" if id(v) in ours else "mean" if v.name.startswith("moving_") else "frozen"
            found.append(TensorSpec(own, rule, shape, tf.as_dtype(v.dtype).name, View.same(shape), own))
            variables[own] = v
    return Named(tuple(found), "keras", why), variables


Stretches = list[tuple[Any, int, int]]
"""Flat variables, from, to."""


def _places(
    plan: Plan, names: Mapping[int, str], state: State
) -> tuple[dict[str, int], dict[str, dict[str, list[tuple[View, Stretches]]]]]:
    """The group of each trained variable; per vector and variable, where its elements are, in their order.

    names: by id of a variable.
    """
    groups: dict[str, int] = {}
    places: dict[str, dict[str, list[tuple[View, Stretches]]]] = {vector: {} for vector in state.vectors}
    found: dict[tuple[str, int, int], Stretches] = {}
    for segment, (laid, there) in enumerate(zip(plan.layout.segments, plan.places, strict=True)):
        for number, (entry, place) in enumerate(zip(laid.entries, there, strict=True)):
            if laid.rule == "slow":
                own = names[id(place.variable)]
                groups[own] = entry.group
                for vector in state.vectors:
                    stretches: Stretches = found.setdefault((vector, segment, number), [])
                    places[vector].setdefault(own, []).append((place.view, stretches))
    slow = [chunk for chunk in plan.layout.chunks if chunk.rule == "slow"]
    for position, chunk in enumerate(slow):
        for number, start, stop, at in plan.layout.spans(chunk):
            for vector, flats in state.vectors.items():
                found[vector, chunk.segment, number].append((flats[position], at, at + stop - start))
    return groups, places


def _kind(innermost: Any) -> str:
    if type(innermost) is keras.optimizers.SGD:
        return SGD
    if type(innermost) in (keras.optimizers.Adam, keras.optimizers.AdamW):
        return ADAM
    return f"keras.{type(innermost).__name__}"


def _buffers(innermost: Any, kind: str) -> dict[str, Sequence[Any]]:
    """Variables per buffer, in the order of what is trained."""
    if kind == SGD:
        return {"velocity": innermost.momentums} if innermost.momentums else {}
    if kind != ADAM:
        return {}
    found = {"moment1": innermost._momentums, "moment2": innermost._velocities}
    return {**found, "moment2_max": innermost._velocity_hats} if innermost.amsgrad else found
