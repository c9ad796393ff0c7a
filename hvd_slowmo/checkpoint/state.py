"""A worker's whole state as named arrays in the wire's orientation, and back: the same names in every framework.

model/ENTRY                                     parameters and statistics
anchor/ENTRY, v/ENTRY, push/ENTRY, sent/ENTRY   what SlowMo keeps beside them
progress/FIELD                                  the scalars; those of a parameter group with a value per parameter
base/BUFFER/ENTRY                               the base optimizer's buffers
rest/FRAMEWORK/NAME                             what one framework alone has
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.checkpoint.file import Arrays, CheckpointError
from hvd_slowmo.checkpoint.inner_state import ADAM, ALIKE, OTHER, SGD, Buffers, Carried, converted
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.progress import Observed, Progress
from hvd_slowmo.wire.tensors import TensorSpec, describe

PER_GROUP = ("rates", "gamma")
OF_GOSSIP = ("w", "arriving", "flight")
OF_THIS_WORKER = ("observed", "excluded")
"""Fields of `Progress`: with a value per parameter group; about gossip; what a run does not need to go on."""

IN_FLIGHT = ("push", "sent")
"""The vectors that mean something only while gossip is between two averages."""


@dataclass(frozen=True)
class Named:
    """A model's tensors as a checkpoint names them.

    naming: "wire" where the entries are those of a ParameterMap, so that both frameworks have them; otherwise the
        framework whose own names they are.
    why: in the latter case, why they can't be put on the wire.
    """

    entries: tuple[TensorSpec, ...]
    naming: str = "wire"
    why: str = ""


class Side(Protocol):
    """What an adapter tells of one worker and takes back. Arrays are of the adapter's own shapes, by its own names.

    groups: the parameter group of each tensor that the optimizer trains, by its name.
    rates: float64 (G,), the learning rates in force, one per group.
    rate_types: in which type each of them is kept.
    progress: with NumPy arrays.
    vectors: what is kept for each trained tensor beside the model.
    graph: tells gossip's topologies apart; None over another base.
    kind: of the base optimizer: one of `base_state.ALIKE`, otherwise the framework and the class, "torch.RMSprop", and
        only that class can read its buffers.
    keeps: names of the buffers that one of an alike kind keeps with its settings, in this framework's form.
    form: in which units this framework's SGD keeps its momentum, see `hvd_slowmo.checkpoint.inner_state`.
    carried: kept with the optimizer.
    """

    framework: str
    config: SlowMoConfig
    named: Named
    groups: dict[str, int]
    rates: NDArray[Any]
    rate_types: list[np.dtype[Any]]
    progress: Progress
    vectors: list[str]
    graph: str | None
    kind: str
    keeps: list[str]
    form: str
    carried: Carried

    def read(self, vector: str, own: str) -> NDArray[Any]:
        """A whole tensor; bfloat16 as float32. vector: "model" or one of `vectors`."""

    def write(self, vector: str, own: str, value: NDArray[Any]) -> None:
        """Set it, in place; what is read afterwards has it, the training once `finish` is called."""

    def base(self) -> Buffers:
        """The base optimizer's buffers; nothing in them where they are as before the first step.

        Raises:
            ValueError: they can't be stored.
        """

    def prepare_base(self, buffers: Buffers, step: int) -> Callable[[], None]:
        """What gives the base optimizer these buffers; nothing is changed before it is called.

        Args:
            step: inner steps completed.

        Raises:
            ValueError: they don't fit.
        """

    def rest(self) -> Arrays:
        """What the model and the optimizer hold besides and no other framework has, by name."""

    def finish(self, progress: Progress, rates: NDArray[Any], rest: Mapping[str, NDArray[Any]]) -> None:
        """Set these; each entry of `rest` is one of `rest()`, of its shape and type."""


def facts_of(side: Side) -> dict[str, Any]:
    """What a checkpoint and whoever loads it must have in common, in JSON types."""
    found = {
        "config": side.config.facts(),
        "naming": side.named.naming,
        "entries": describe(side.named.entries),
        "trained": [entry.name for entry in trained(side)],
        "vectors": list(side.vectors),
        "graph": side.graph,
        "base": side.kind,
    }
    result: dict[str, Any] = json.loads(json.dumps(found))
    return result


def trained(side: Side) -> list[TensorSpec]:
    """The entries that the optimizer trains."""
    return [entry for entry in side.named.entries if entry.own in side.groups]


def at_rest(progress: Progress) -> bool:
    """Whether no messages are on their way and all push-sum weights are 1, as over a base that has none."""
    return not progress.flight and bool((np.asarray(progress.w) == 1).all())


def collect(side: Side) -> Arrays:
    """Everything that a resume needs."""
    found = {f"model/{e.name}": e.view.to_wire(side.read("model", e.own)) for e in side.named.entries}
    entries, progress = trained(side), side.progress
    still = at_rest(progress)
    for vector in side.vectors:
        if not (still and vector in IN_FLIGHT):
            found |= {f"{vector}/{e.name}": e.view.to_wire(side.read(vector, e.own)) for e in entries}
    for field, value in progress._asdict().items():
        if field in PER_GROUP:
            value = np.array([value[side.groups[e.own]] for e in entries], dtype=np.float64)
        if not (still and field in OF_GOSSIP):
            found[f"progress/{field}"] = np.asarray(value)
    places = [(e.own, side.groups[e.own]) for e in entries]
    rates = [side.carried.rate(own, float(side.rates[group]), side.rate_types[group]) for own, group in places]
    found["progress/learning_rate"] = np.array(rates, dtype=np.float64)
    found |= _collected_base(side, entries)
    return found | {f"rest/{side.framework}/{name}": np.asarray(value) for name, value in side.rest().items()}


def _collected_base(side: Side, entries: Sequence[TensorSpec]) -> Arrays:
    buffers, kind = side.base(), side.kind
    if kind == SGD and side.form in buffers:
        buffers = side.carried.buffers(side.form, buffers[side.form])
    if kind not in ALIKE:
        return {f"base/{key}/{own}": x for key, values in buffers.items() for own, x in values.items()}
    return {
        f"base/{key}/{e.name}": e.view.to_wire(values[e.own]) if key != "steps" else values[e.own]
        for key, values in buffers.items()
        for e in entries
        if e.own in values
    }


def beginning(side: Side, weights: Mapping[str, NDArray[Any]]) -> Arrays:
    """The state of a training that begins with these weights, as `collect` gives it.

    Args:
        weights: the model's, "model/ENTRY".
    """
    found, entries = dict(weights), trained(side)
    for vector in side.vectors:
        for entry in entries if vector not in IN_FLIGHT else ():
            like, value = side.read(vector, entry.own), weights[f"model/{entry.name}"]
            start = np.zeros_like(value) if vector == "v" else value
            found[f"{vector}/{entry.name}"] = start.astype(like.dtype)
    for field, value in side.progress._asdict().items():
        if field not in OF_GOSSIP:
            found[f"progress/{field}"] = np.zeros(len(entries)) if field in PER_GROUP else np.zeros_like(value)
    return found | {"progress/learning_rate": np.array([side.rates[side.groups[e.own]] for e in entries])}


def prepare(side: Side, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Callable[[], None]:
    """What makes a worker continue from a state whose facts fit it; nothing is changed before it is called.

    Args:
        facts: those of the checkpoint.
        arrays: of this worker, as `collect` gives them.

    Raises:
        CheckpointError: something is missing, too much, or of another shape or type.
    """
    given = dict(arrays)
    writes = _vectors(side, given)
    entries = trained(side)
    rates = _per_group(side, entries, _taken(given, "progress/learning_rate", np.zeros(len(entries))), "learning rate")
    progress = _progress(side, entries, given)
    base = _base(side, facts, given, rates)
    commit_base = side.prepare_base(base.buffers, int(progress.step))
    rest = _rest(side, given)
    if given:
        raise CheckpointError(f"the checkpoint holds {', '.join(sorted(given)[:3])}, which has no place in this job.")

    def commit() -> None:
        for vector, entry, value in writes:
            side.write(vector, entry.own, entry.view.to_own(value, side.read(vector, entry.own)))
        commit_base()
        side.carried.forget()
        for own, value, rate in base.converted:
            side.carried.taken(own, value, rate)
        for own, group in side.groups.items():
            side.carried.taken_rate(own, float(rates[group]))
        side.finish(progress, rates, rest)

    return commit


def _vectors(side: Side, given: Arrays) -> list[tuple[str, TensorSpec, NDArray[Any]]]:
    found = []
    wanted = [("model", entry) for entry in side.named.entries]
    flying = any(name.split("/")[0] in IN_FLIGHT for name in given)
    wanted += [(v, e) for v in side.vectors if flying or v not in IN_FLIGHT for e in trained(side)]
    for vector, entry in wanted:
        like = entry.view.to_wire(side.read(vector, entry.own))
        found.append((vector, entry, _taken(given, f"{vector}/{entry.name}", like)))
    return found


def _taken(given: Arrays, name: str, like: NDArray[Any]) -> NDArray[Any]:
    """An array of the checkpoint, which must be like this one."""
    value = given.pop(name, None)
    if value is None:
        raise CheckpointError(f"the checkpoint has no {name!r}.")
    if (value.shape, value.dtype) != (like.shape, like.dtype):
        raise CheckpointError(
            f"the checkpoint's {name!r} is {value.dtype} of shape {value.shape}, here it is {like.dtype} of shape "
            f"{like.shape}."
        )
    return value


def _progress(side: Side, entries: Sequence[TensorSpec], given: Arrays) -> Progress:
    own = side.progress
    rest = {"w": np.ones_like(own.w), "arriving": np.zeros_like(own.arriving), "flight": np.int64(0)}
    absent = {"observed": np.zeros(len(Observed._fields)), "excluded": np.int64(0)}
    if any(f"progress/{field}" in given for field in OF_GOSSIP):
        rest = {}
    values: dict[str, Any] = {}
    for field in Progress._fields:
        name = f"progress/{field}"
        if field in rest or (field in absent and name not in given):
            values[field] = {**absent, **rest}[field]
        elif field in PER_GROUP:
            values[field] = _per_group(side, entries, _taken(given, name, np.zeros(len(entries))), field)
        else:
            values[field] = _taken(given, name, np.asarray(getattr(own, field)))
    scalar = {field: int(value) for field, value in values.items() if np.ndim(value) == 0}
    return Progress(**{**values, **scalar})


def _per_group(side: Side, entries: Sequence[TensorSpec], values: NDArray[Any], what: str) -> NDArray[Any]:
    """The value of each parameter group of this optimizer, of values per trained entry."""
    result = np.zeros(len(side.rates))
    first: dict[int, tuple[TensorSpec, float]] = {}
    for entry, value in zip(entries, values, strict=True):
        group = side.groups[entry.own]
        other, expected = first.setdefault(group, (entry, float(value)))
        if float(value) != expected:
            raise CheckpointError(
                f"{other.name} and {entry.name} were in parameter groups of their own ({what} {expected:g} and "
                f"{float(value):g}), here they are in one. Give this optimizer groups as the run that is resumed had "
                "them; Keras has one for all."
            )
        result[group] = value
    return result


@dataclass(frozen=True)
class _Base:
    buffers: Buffers
    converted: list[tuple[str, NDArray[Any], float]]  # name, as given, rate


def _base(side: Side, facts: Mapping[str, Any], given: Arrays, rates: NDArray[Any]) -> _Base:
    """The base optimizer's buffers in its own names, shapes and units."""
    own = side.kind
    found = {name: given.pop(name) for name in list(given) if name.startswith("base/")}
    if not found:
        return _Base({}, [])
    if facts["base"] != own:
        raise CheckpointError(
            f"the base optimizer's buffers in the checkpoint are those of {_spell(facts['base'])}, this one is "
            f"{_spell(own)}, which can't take them. Use the optimizer of the run that is resumed, or begin a new "
            "training from the weights alone (hvd-slowmo convert)."
        )
    buffers: Buffers = {}
    if own not in ALIKE:
        for name, value in found.items():
            _, key, tensor = name.split("/", 2)
            buffers.setdefault(key, {})[tensor] = value
        return _Base(buffers, [])
    changed = []
    for entry in trained(side):
        for key in ALIKE[own]:
            buffer = found.pop(f"base/{key}/{entry.name}", None)
            if buffer is not None:
                _put(buffers.setdefault(key, {}), entry, key, buffer)
    if found:
        raise CheckpointError(f"the checkpoint holds {min(found)}, which is no buffer of this optimizer.")
    if own == SGD:
        for name, value in buffers.pop(OTHER[side.form], {}).items():
            rate = float(rates[side.groups[name]])
            buffers.setdefault(side.form, {})[name] = converted(name, value, side.form, rate)
            changed.append((name, value, rate))
    if set(buffers) != set(side.keeps):
        raise CheckpointError(
            f"the base optimizer has {', '.join(sorted(buffers))} in the checkpoint, and keeps "
            f"{', '.join(sorted(side.keeps)) or 'nothing'} here. Give it the settings of the run that is resumed "
            "(momentum, amsgrad)."
        )
    return _Base(buffers, changed)


def _put(buffer: dict[str, NDArray[Any]], entry: TensorSpec, key: str, value: NDArray[Any]) -> None:
    shape = () if key == "steps" else entry.shape
    if value.shape != shape:
        raise CheckpointError(f"the checkpoint's base/{key}/{entry.name} has shape {value.shape}, here it is {shape}.")
    if key == "steps":
        buffer[entry.own] = value
    else:
        buffer[entry.own] = entry.view.to_own(value, buffer.get(entry.own, np.zeros(entry.view.own, value.dtype)))


def _rest(side: Side, given: Arrays) -> Arrays:
    """What is this framework's; what is another's has no place here and is left out."""
    own, found = side.rest(), {}
    for name in [name for name in given if name.startswith("rest/")]:
        _, framework, key = name.split("/", 2)
        if framework != side.framework:
            del given[name]
        elif key in own:
            found[key] = _taken(given, name, own[key])
    return found


def _spell(kind: str) -> str:
    return {SGD: "SGD", ADAM: "Adam or AdamW"}.get(kind, kind)
