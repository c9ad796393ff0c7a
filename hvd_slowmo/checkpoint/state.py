"""A worker's whole state as named arrays in the wire's orientation, and back: the same names in every framework.

model/ENTRY                                     parameters and statistics
anchor/ENTRY, v/ENTRY, push/ENTRY, sent/ENTRY   the vectors that SlowMo keeps beside them
in_flight/ENTRY                                 parameters and statistics that were sent, and not averaged yet
slice_residual/CHUNK                            what rounding this worker's slice of a mean in few bits has withheld
progress/FIELD                                  the scalars; those of a parameter group with a value per parameter
optimizer_state/BUFFER/ENTRY                    the inner optimizer's state
optimizer_state/settings/FRAMEWORK              values that it changes elsewhere
framework/FRAMEWORK/NAME                        state that one framework alone has
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.checkpoint.file import Arrays
from hvd_slowmo.checkpoint.inner_state import (
    ALIKE,
    SETTINGS,
    SGD,
    OptimizerKind,
    OptimizerState,
    check_buffers,
    convert_momentum,
    spell_kind,
)
from hvd_slowmo.checkpoint.naming import NamedTensors
from hvd_slowmo.checkpoint.progress import check_progress, check_rates
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.progress import PER_GROUP, Flight, Progress, PushSum
from hvd_slowmo.errors import CheckpointError
from hvd_slowmo.wire.parameter_map import Framework
from hvd_slowmo.wire.tensors import TensorSpec, describe

NOT_NEEDED = ("observed", "excluded")
"""Fields of `Progress` that a run does not need to go on."""

IN_FLIGHT = ("push", "sent")
"""Vectors that mean something only while gossip is between two averages."""

LEARNING_RATE = "progress/learning_rate"


class WorkerState(Protocol):
    """One worker's state as an adapter reads and writes it. Arrays have the framework's own shapes.

    Attributes:
        framework: its name in the arrays' names.
        config: the settings.
        tensors: of the model, by their names in the checkpoint.
        groups: the common parameter group of each trained tensor, by its own name.
        averaged: own names of the tensors that are averaged: the trained ones and statistics.
        rates: float64 (G,), the learning rates in force, one per common group.
        progress: with NumPy arrays.
        vectors: names of the vectors kept for each trained tensor beside the model.
        graph: digest of the gossip's topology; None without gossip.
        optimizer: kind of the inner optimizer.
        slice_residuals: by number of a chunk, as a text; `finish` takes over what has been put there.
    """

    framework: Framework
    config: SlowMoConfig
    tensors: NamedTensors
    groups: dict[str, int]
    averaged: set[str]
    rates: NDArray[np.float64]
    progress: Progress
    vectors: list[str]
    graph: str | None
    optimizer: OptimizerKind
    slice_residuals: dict[str, NDArray[Any]]

    def read(self, vector: str, own: str) -> NDArray[Any]:
        """Return a whole tensor by its own name; bfloat16 as float32.

        Args:
            vector: "model", one of `vectors` or, with a delay, "in_flight": zeros where nothing is.
        """

    def write(self, vector: str, own: str, value: NDArray[Any]) -> None:
        """Set a whole tensor, in place. `read` returns it from now on; training sees it once `finish` was called."""

    def read_optimizer(self) -> OptimizerState:
        """Return the inner optimizer's state, {} if it is that from before the first step.

        Raises:
            ValueError: it can't be stored.
        """

    def prepare_optimizer(self, state: OptimizerState, step: int) -> Callable[[], None]:
        """Return a function that gives the inner optimizer this state; nothing is changed before it is called.

        Args:
            step: inner steps completed.

        Raises:
            ValueError: the state does not fit.
        """

    def read_framework(self) -> Arrays:
        """Return the rest of the state of model and optimizer, which no other framework has, by name."""

    def finish(self, progress: Progress, rates: NDArray[np.float64], framework: Mapping[str, NDArray[Any]]) -> None:
        """Set the scalars, the learning rates and the state that no other framework has.

        Args:
            framework: some of `read_framework()`, with its shapes and types.
        """


def facts_of(state: WorkerState) -> dict[str, Any]:
    """Return the facts that a checkpoint and a worker that loads it must have in common, in JSON types."""
    facts = {
        "config": state.config.common_facts(),
        "naming": state.tensors.naming,
        "tensors": describe(state.tensors.specs),
        "trained": [spec.name for spec in trained(state)],
        "vectors": list(state.vectors),
        "graph": state.graph,
        "inner_optimizer": state.optimizer.name,
    }
    result: dict[str, Any] = json.loads(json.dumps(facts))
    return result


def trained(state: WorkerState) -> list[TensorSpec]:
    """Return the tensors that the optimizer trains."""
    return [spec for spec in state.tensors.specs if spec.own in state.groups]


def travelling(state: WorkerState) -> list[TensorSpec]:
    """Return the tensors that are averaged under their names in the checkpoint."""
    return [spec for spec in state.tensors.specs if spec.own in state.averaged]


def at_rest(progress: Progress) -> bool:
    """Return whether no message is in flight and every push-sum weight is 1, as without gossip.

    Example:
        >>> nothing = np.zeros(0)
        >>> mixing, flight = PushSum(np.ones(2), np.zeros(2), 0), Flight(nothing, nothing, nothing, nothing)
        >>> at_rest(Progress(3, nothing, nothing, nothing, nothing, 0, nothing, mixing, flight))
        True
    """
    mixing = progress.mixing
    return not mixing.in_flight and bool((np.asarray(mixing.weights) == 1).all())


def collect(state: WorkerState) -> Arrays:
    """Return everything that a resume needs."""
    arrays = {f"model/{spec.name}": spec.view.to_wire(state.read("model", spec.own)) for spec in state.tensors.specs}
    specs, rest = trained(state), at_rest(state.progress)
    for vector in state.vectors:
        if not (rest and vector in IN_FLIGHT):
            arrays |= {f"{vector}/{spec.name}": spec.view.to_wire(state.read(vector, spec.own)) for spec in specs}
    sent = bool(np.any(state.progress.flight.launched))
    if sent:
        specs = travelling(state)
        arrays |= {f"in_flight/{spec.name}": spec.view.to_wire(state.read("in_flight", spec.own)) for spec in specs}
    for field, value in state.progress.flat().items():
        if not (rest and field in PushSum._fields) and (sent or field not in Flight._fields):
            arrays[f"progress/{field}"] = _per_parameter(state, value) if field in PER_GROUP else np.asarray(value)
    arrays[LEARNING_RATE] = _per_parameter(state, state.rates)
    arrays |= {f"slice_residual/{chunk}": value for chunk, value in state.slice_residuals.items()}
    arrays |= _collect_optimizer(state)
    return arrays | {f"framework/{state.framework}/{key}": np.asarray(x) for key, x in state.read_framework().items()}


def _per_parameter(state: WorkerState, values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)[..., [state.groups[spec.own] for spec in trained(state)]]


def _collect_optimizer(state: WorkerState) -> Arrays:
    buffers = state.read_optimizer()
    if not state.optimizer.alike:
        return {f"optimizer_state/{key}/{own}": x for key, values in buffers.items() for own, x in values.items()}
    settings = buffers.pop(SETTINGS, {})
    return {f"optimizer_state/{SETTINGS}/{framework}": x for framework, x in settings.items()} | {
        f"optimizer_state/{key}/{spec.name}": values[spec.own]
        if key == "steps"
        else spec.view.to_wire(values[spec.own])
        for key, values in buffers.items()
        for spec in trained(state)
        if spec.own in values
    }


def first_state(state: WorkerState, weights: Mapping[str, NDArray[Any]]) -> Arrays:
    """Return the state of a training that begins with these weights, in the form of `collect`.

    Args:
        weights: the model's, "model/ENTRY".
    """
    arrays, specs = dict(weights), trained(state)
    for vector in state.vectors:
        for spec in specs if vector not in IN_FLIGHT else ():
            like, value = state.read(vector, spec.own), weights[f"model/{spec.name}"]
            start = np.zeros_like(value) if vector in ("v", "residual") else value
            arrays[f"{vector}/{spec.name}"] = start.astype(like.dtype)
    for field, value in state.progress.flat().items():
        if field not in PushSum._fields + Flight._fields:
            zeros = np.zeros_like(value)
            arrays[f"progress/{field}"] = _per_parameter(state, zeros) if field in PER_GROUP else zeros
    return arrays | {LEARNING_RATE: _per_parameter(state, state.rates)}


def prepare(state: WorkerState, kind: str, arrays: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
    """Return a function that makes the worker go on from a checkpoint; nothing is changed before it is called.

    Args:
        kind: of the inner optimizer that the checkpoint is of; its other facts fit the worker's.
        arrays: of this worker, in the form of `collect`.

    Raises:
        CheckpointError: an array is missing, has no place here, has another shape or type, or values of no run.
    """
    left = dict(arrays)
    writes = _take_vectors(state, left)
    rates = _take_per_group(state, left, LEARNING_RATE, "learning rate", state.rates)
    check_rates(rates)
    progress = _take_progress(state, left)
    check_progress(progress, state.progress)
    optimizer = _take_optimizer(state, kind, left, rates)
    commit_optimizer = state.prepare_optimizer(optimizer, int(progress.step))
    framework = _take_framework(state, left)
    residuals = {
        chunk: _take(left, f"slice_residual/{chunk}", like)
        for chunk, like in state.slice_residuals.items()
        if f"slice_residual/{chunk}" in left
    }
    if left:
        raise CheckpointError(f"the checkpoint holds {', '.join(sorted(left)[:3])}, which has no place in this job.")

    def commit() -> None:
        for vector, spec, value in writes:
            state.write(vector, spec.own, spec.view.to_own(value, state.read(vector, spec.own)))
        state.slice_residuals = residuals
        commit_optimizer()
        state.finish(progress, rates, framework)

    return commit


def _take(left: Arrays, name: str, like: NDArray[Any]) -> NDArray[Any]:
    """Take an array of the checkpoint, which must have this one's shape and type."""
    value = left.pop(name, None)
    if value is None:
        raise CheckpointError(f"the checkpoint has no {name!r}.")
    if (value.shape, value.dtype) != (like.shape, like.dtype):
        raise CheckpointError(
            f"the checkpoint's {name!r} is {value.dtype} of shape {value.shape}, here it is {like.dtype} of shape "
            f"{like.shape}."
        )
    return value


def _take_vectors(state: WorkerState, left: Arrays) -> list[tuple[str, TensorSpec, NDArray[Any]]]:
    wanted = [("model", spec) for spec in state.tensors.specs]
    in_flight = any(name.split("/")[0] in IN_FLIGHT for name in left)
    vectors = [vector for vector in state.vectors if in_flight or vector not in IN_FLIGHT]
    wanted += [(vector, spec) for vector in vectors for spec in trained(state)]
    if any(name.startswith("in_flight/") for name in left):
        wanted += [("in_flight", spec) for spec in travelling(state)]
    return [
        (vector, spec, _take(left, f"{vector}/{spec.name}", spec.view.to_wire(state.read(vector, spec.own))))
        for vector, spec in wanted
    ]


def _take_progress(state: WorkerState, left: Arrays) -> Progress:
    current = {field: np.asarray(value) for field, value in state.progress.flat().items()}
    absent = {field: np.zeros_like(current[field]) for field in NOT_NEEDED}
    if not any(f"progress/{field}" in left for field in PushSum._fields):
        absent |= {field: np.zeros_like(current[field]) for field in PushSum._fields}
        absent["weights"] = np.ones_like(current["weights"])
    if not any(f"progress/{field}" in left for field in Flight._fields):
        absent |= {field: np.zeros_like(current[field]) for field in Flight._fields}
    values: dict[str, Any] = {}
    for field, value in current.items():
        name = f"progress/{field}"
        if field in absent and name not in left:
            values[field] = absent[field]
        elif field in PER_GROUP:
            values[field] = _take_per_group(state, left, name, field, value)
        else:
            values[field] = _take(left, name, value)
    return Progress.from_flat({field: int(x) if np.ndim(x) == 0 else x for field, x in values.items()})


def _take_per_group(
    state: WorkerState, left: Arrays, name: str, title: str, like: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Take values per trained tensor, which must be one within each parameter group of this optimizer.

    Args:
        like: the values per group.
    """
    specs, result = trained(state), np.zeros_like(like)
    saved = _take(left, name, _per_parameter(state, like))
    first: dict[int, tuple[TensorSpec, int]] = {}
    for number, spec in enumerate(specs):
        group = state.groups[spec.own]
        other, known = first.setdefault(group, (spec, number))
        value, expected = saved[..., number], saved[..., known]
        if not np.array_equal(value, expected, equal_nan=True):
            a, b = expected.flat[np.argmax(value != expected)], value.flat[np.argmax(value != expected)]
            raise CheckpointError(
                f"{other.name} and {spec.name} were in different parameter groups ({title} {a:g} and {b:g}),"
                " here they are in one. Give this optimizer the groups of the run that is resumed; Keras has one for "
                "all."
            )
        result[..., group] = value
    return result


def _take_optimizer(state: WorkerState, kind: str, left: Arrays, rates: NDArray[np.float64]) -> OptimizerState:
    """Take the inner optimizer's state in its own names, shapes and units.

    Args:
        kind: of the inner optimizer that the checkpoint is of.
    """
    own = state.optimizer
    saved = {name: left.pop(name) for name in list(left) if name.startswith("optimizer_state/")}
    prefix = f"optimizer_state/{SETTINGS}/"
    everyones = {name.removeprefix(prefix): saved.pop(name) for name in list(saved) if name.startswith(prefix)}
    settings: dict[str, NDArray[Any]] = {
        framework: value for framework, value in everyones.items() if framework == state.framework
    }
    if not saved and not settings:
        return {}
    if kind != own.name:
        raise CheckpointError(
            f"the inner optimizer's state in the checkpoint is that of {spell_kind(kind)}, this one is "
            f"{spell_kind(own.name)}, which can't read it. Use the optimizer of the run that is resumed, or begin a "
            "new run with the weights alone (hvd-slowmo convert)."
        )
    buffers = _take_buffers(state, saved, rates) if saved else {}
    return {**buffers, SETTINGS: settings} if settings else buffers


def _take_buffers(state: WorkerState, saved: Arrays, rates: NDArray[np.float64]) -> OptimizerState:
    """Take the state of the parameters; `saved` has it by its names in the checkpoint."""
    own = state.optimizer
    buffers: OptimizerState = {}
    if not own.alike:
        for name, value in saved.items():
            key, _, tensor = name.removeprefix("optimizer_state/").partition("/")
            buffers.setdefault(key, {})[tensor] = value
        return buffers
    for spec in trained(state):
        for key in ALIKE[own.name]:
            buffer = saved.pop(f"optimizer_state/{key}/{spec.name}", None)
            if buffer is not None:
                _put(buffers.setdefault(key, {}), spec, key, buffer)
    if saved:
        raise CheckpointError(f"the checkpoint holds {min(saved)}, which is no buffer of this optimizer.")
    if own.name == SGD:
        other = "velocity" if own.form == "momentum" else "momentum"
        for name, value in buffers.pop(other, {}).items():
            converted = convert_momentum(name, value, own.form, float(rates[state.groups[name]]))
            buffers.setdefault(own.form, {})[name] = converted
    check_buffers(buffers, own.buffers)
    return buffers


def _put(buffer: dict[str, NDArray[Any]], spec: TensorSpec, key: str, value: NDArray[Any]) -> None:
    shape, name = () if key == "steps" else spec.shape, f"optimizer_state/{key}/{spec.name}"
    if value.shape != shape:
        raise CheckpointError(f"the checkpoint's {name} has shape {value.shape}, here it is {shape}.")
    if value.dtype.kind != ("i" if key == "steps" else "f") or (key == "steps" and value < 0):
        raise CheckpointError(
            f"the checkpoint's {name} must be {'an integer >= 0' if key == 'steps' else 'floating-point numbers'}. "
            f"Received: {value if key == 'steps' else value.dtype}"
        )
    if key == "steps":
        buffer[spec.own] = value
    else:
        buffer[spec.own] = spec.view.to_own(value, buffer.get(spec.own, np.zeros(spec.view.own, value.dtype)))


def _take_framework(state: WorkerState, left: Arrays) -> Arrays:
    """Take this framework's own state; another one's has no place here and is left out."""
    current, taken = state.read_framework(), {}
    for name in [name for name in left if name.startswith("framework/")]:
        framework, _, key = name.removeprefix("framework/").partition("/")
        if framework != state.framework:
            del left[name]
        elif key in current:
            taken[key] = _take(left, name, current[key])
    return taken
