"""The facts of a checkpoint's files as typed records: parsed once, at the only place where they come in.

A reader of the records may rely on their types and ranges. They say nothing about the arrays beside them.
"""

from __future__ import annotations

import re
import reprlib
import threading
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.errors import CheckpointError
from hvd_slowmo.settings import Bits, Gradients, InnerState, Nonfinite, SlowState
from hvd_slowmo.wire.tensors import Role

T = TypeVar("T")

Kind: TypeAlias = Literal[
    "model",
    "anchor",
    "v",
    "residual",
    "slice_residual",
    "average",
    "push",
    "sent",
    "in_flight",
    "progress",
    "optimizer_state",
]
"""The first part of an array's name, where it belongs to a training in any framework."""

Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive: TypeAlias = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Checksum: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]


class SGPFacts(Struct, frozen=True, forbid_unknown_fields=True, tag_field="method", tag="sgp"):
    """`SGP.facts()`. A topology is a name, "function NAME" or an array."""

    topology: str | list[Any] | None
    overlap: bool


class DPSGDFacts(Struct, frozen=True, forbid_unknown_fields=True, tag_field="method", tag="dpsgd"):
    """`DPSGD.facts()`."""

    topology: str | list[Any] | None


class ConfigFacts(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`SlowMoConfig.facts()`: the same fields, each within its range."""

    tau: Positive | None
    alpha: Annotated[float, Meta(gt=0)]
    beta: Annotated[float, Meta(ge=0, lt=1)]
    nesterov: bool
    scale_by_lr: bool
    inner_state: InnerState
    gossip: SGPFacts | DPSGDFacts | None
    average: bool
    gradients: Gradients
    warmup_steps: Count
    nonfinite: Nonfinite
    fragments: Positive
    delay: Count
    bits: Bits
    shard: bool
    slow_state: SlowState = "device"  # workers and checkpoints may differ in it


class TensorFacts(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """`TensorSpec.describe()`."""

    name: str
    role: Role
    shape: tuple[Count, ...]
    dtype: str
    note: str


class WorkerFacts(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Facts of the file of one worker alone."""

    rank: Count
    workers: Positive

    def __post_init__(self) -> None:
        if self.rank >= self.workers:
            raise ValueError(f"Expected `rank` below `workers`, got {self.rank} of {self.workers}")


class WeightsFacts(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Facts of a file of weights alone, with which a training can begin."""

    naming: Literal["wire", "torch", "keras"]
    reason: str
    tensors: tuple[TensorFacts, ...]
    config: None = None
    workers: Literal[1] = 1
    files: dict[Count, Checksum] = {}  # empty
    per_worker: tuple[Kind, ...] = ()  # empty

    def __post_init__(self) -> None:
        if self.files or self.per_worker:
            raise ValueError("Expected no `files` and no `per_worker` without `config`")


class TrainingFacts(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Facts of the common file of a training's checkpoint.

    Attributes:
        config: the settings.
        naming, reason: see `hvd_slowmo.checkpoint.naming.NamedTensors`.
        tensors: of the model.
        trained: names of those that are trained.
        vectors: names of the vectors beside the model.
        graph: digest of the gossip's topology.
        inner_optimizer: name of its kind.
        workers: number of workers.
        files: identity of a worker's own file, by its rank.
        per_worker: kinds of arrays without which a job of another size would not be this one.
    """

    config: ConfigFacts
    naming: Literal["wire", "torch", "keras"]
    reason: str
    tensors: tuple[TensorFacts, ...]
    trained: tuple[str, ...]
    vectors: tuple[str, ...]
    graph: str | None
    inner_optimizer: str
    workers: Positive
    files: dict[Count, Checksum]
    per_worker: tuple[Kind, ...]

    def __post_init__(self) -> None:
        if max(self.files, default=0) >= self.workers:
            raise ValueError(f"Expected ranks below {self.workers} in `files`, got {max(self.files)}")


ModelFacts: TypeAlias = WeightsFacts | TrainingFacts
"""Facts of a checkpoint's common file."""

Facts: TypeAlias = WorkerFacts | ModelFacts


# msgspec looks at a type when it first meets it, and crashes where two threads do so at once.
_ONE_AT_A_TIME = threading.Lock()


def parse(value: Any, kind: type[T], owner: str) -> T:
    """Return JSON types as a record of this kind.

    Args:
        value: JSON types, or a dict that holds other objects where the record says so.
        kind: a Struct, or another type that msgspec knows.
        owner: of the value, for the message.

    Raises:
        CheckpointError: a field is missing, unknown, of another type or out of its range; the message names it and
            what was found.

    Example:
        >>> parse({"rank": 0, "workers": "2"}, WorkerFacts, "job.rank0")
        Traceback (most recent call last):
        hvd_slowmo.errors.CheckpointError: job.rank0 is not as SlowMo writes it: Expected `int`, got `str` - at `$.workers`. Received: '2'. Use another checkpoint, or a copy of this one.
    """  # noqa: E501 - an error is one line
    try:
        with _ONE_AT_A_TIME:
            return msgspec.convert(value, kind, str_keys=True)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{owner} is not as SlowMo writes it: {error}.{_spell_received(value, str(error))} Use another checkpoint, "
            "or a copy of this one."
        ) from error


def _spell_received(value: Any, error: str) -> str:
    """Return a sentence with the value at the path that an error of msgspec's names, "" if it is none of one value."""
    path = re.search(r"at `\$((?:\.\w+|\[\d+\])*)`\Z", error)
    if path is None:
        return ""
    for name, number in re.findall(r"\.(\w+)|\[(\d+)\]", path.group(1)):
        if name and isinstance(value, dict):
            value = value.get(name)
        elif number and isinstance(value, (list, tuple)):
            value = value[int(number)]
        else:
            return ""
    return f" Received: {reprlib.repr(value)}."


def parse_facts(value: Any, owner: str) -> Facts:
    """Return the facts of a file, of whichever kind it is.

    Raises:
        CheckpointError: as `parse`.

    Example:
        >>> parse_facts({"rank": 0, "workers": 2}, "job.rank0")
        WorkerFacts(rank=0, workers=2)
    """
    if isinstance(value, dict) and "rank" in value:
        return parse(value, WorkerFacts, owner)
    if isinstance(value, dict) and value.get("config", ...) is None:
        return parse(value, WeightsFacts, owner)
    return parse(value, TrainingFacts, owner)


def plain(facts: Struct) -> dict[str, Any]:
    """Return a record in JSON types, with the texts of `parse_facts` as keys.

    Example:
        >>> plain(WorkerFacts(rank=0, workers=2))
        {'rank': 0, 'workers': 2}
    """
    result: dict[str, Any] = msgspec.to_builtins(facts, str_keys=True)
    return result


def parse_config(value: Any, owner: str) -> SlowMoConfig:
    """Return the settings that a file holds as `SlowMoConfig.facts()`.

    Raises:
        CheckpointError: as `parse`, or the settings can't go together.

    Example:
        >>> parse_config(SlowMoConfig(tau=3).facts(), "model.keras").tau
        3
    """
    facts = plain(parse(value, ConfigFacts, owner))
    try:
        return SlowMoConfig.from_facts(facts)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{owner} has settings that can't be used: {error}") from error
