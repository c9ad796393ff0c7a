"""SlowMo's part of an optimizer's state_dict, and the checks before any of it is loaded.

Tensors, numbers, strings, lists and dicts only, so that torch.load(weights_only=True) reads it.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
import torch
from msgspec import Struct

from hvd_slowmo.checkpoint.facts import ConfigFacts, Count, Positive, parse, plain
from hvd_slowmo.checkpoint.progress import parse_progress
from hvd_slowmo.core.parts.layout import Layout
from hvd_slowmo.core.parts.progress import Progress
from hvd_slowmo.core.parts.schedule import workers_equal
from hvd_slowmo.core.start.handshake import agree
from hvd_slowmo.errors import CheckpointError, spell_error
from hvd_slowmo_torch.inner import inner_settings
from hvd_slowmo_torch.inner.saved_inner import check_saved, unmarked
from hvd_slowmo_torch.model.store import TorchStore
from hvd_slowmo_torch.model.watch import WatchNotes
from hvd_slowmo_torch.worker import TorchWorker

logger = logging.getLogger("hvd_slowmo")

KEY = "slowmo"
FORMAT = 4

_Form: TypeAlias = tuple[torch.Size, torch.dtype]


def pack(worker: TorchWorker) -> dict[str, Any]:
    """Return the entry "slowmo" of a state_dict: a worker's scalars and vectors, and the inner optimizer's attributes.

    No communication.
    """
    config, comm, progress = worker.config, worker.comm, worker.progress
    attributes = inner_settings.dump(worker.inner, attributes_only=True)
    return {
        "format": FORMAT,
        "config": config.common_facts(),
        "rank": comm.rank,
        "size": comm.size,
        "common": workers_equal(config, progress) and not config.shards,
        "progress": {field: np.asarray(value).tolist() for field, value in progress.flat().items()},
        "parameters": _parameters(worker.assembly.machine.layout),
        "vectors": {name: [t for t in parts if t is not None] for name, parts in worker.store.vectors.items()},
        "in_flight": dict(worker.store.in_flight),
        "slices": {name: dict(by_chunk) for name, by_chunk in worker.store.slices.items()},
        "watch": worker.store.watch.notes()._asdict(),
        "evaluating": worker.evaluating,
        "inner_attributes": None if attributes is None else bytes(attributes).decode(),
    }


def compare_at_broadcast(worker: TorchWorker) -> None:
    """Refuse a broadcast of the optimizer's state that would have to move something. A collective.

    Horovod broadcasts only what rank 0 has, and a rank without state would not even take part.

    Raises:
        ValueError: on every rank, if they are not at the same step or not all have inner state.
    """
    place = "hvd.broadcast_optimizer_state (load a state on every rank after SlowMo is made, and omit this call)"
    facts = {f"steps at {place}": int(worker.progress.step), f"inner state at {place}": bool(worker.inner.state)}
    agree(worker.comm.scoped("broadcast"), facts, {}, None)


class _Parameter(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    name: str
    shape: tuple[Count, ...]
    dtype: str
    group: Count

    def __str__(self) -> str:
        return f"{self.name!r} {self.shape} {self.dtype} in group {self.group}"


class _Notes(Struct, frozen=True, forbid_unknown_fields=True):
    """`WatchNotes`."""

    norms: dict[str, float]
    held: dict[str, bool]
    moved: dict[str, list[bool]]
    sent_moved: dict[str, list[bool]]
    entered: list[bool]
    sent_entered: list[bool]

    def lengths(self) -> set[int]:
        """Return the numbers of fragments that the notes are of; of valid ones, it is one number."""
        return set(map(len, (*self.moved.values(), *self.sent_moved.values(), self.entered, self.sent_entered)))


class Saved(Struct, frozen=True, forbid_unknown_fields=True):
    """The entry "slowmo" of a state_dict: types alone are checked. `pack` has the meaning of each field."""

    format: int
    config: ConfigFacts
    rank: Count
    size: Positive
    common: bool
    progress: dict[str, Any]
    parameters: tuple[_Parameter, ...]
    vectors: dict[str, list[torch.Tensor]]
    in_flight: dict[Count, torch.Tensor]
    slices: dict[str, dict[Count, torch.Tensor]]
    watch: _Notes | None = None
    evaluating: bool = False
    inner_attributes: str | None = None


class Loadable(NamedTuple):
    """A state that fits a worker, checked."""

    inner: dict[str, Any]  # the inner optimizer's state_dict
    set_attributes: Callable[[], None]  # of the inner optimizer
    saved: Saved
    progress: Progress


def check(state_dict: Mapping[str, Any], worker: TorchWorker) -> Loadable:
    """Return what is to be loaded of a state_dict, if this worker may continue from it. Nothing is changed.

    Raises:
        CheckpointError: the state is not SlowMo's, or is of other settings, another model, another number of workers,
            or another worker alone, or an entry is missing or of another type; the message has the first difference.
    """
    if KEY not in state_dict:
        raise CheckpointError(
            "this is no state_dict of SlowMo: it has no entry 'slowmo'. To start from a plain optimizer's state, load "
            "it into the inner optimizer before wrapping it."
        )
    entry = state_dict[KEY]
    if isinstance(entry, dict) and entry.get("format") != FORMAT:
        raise CheckpointError(
            f"the state has format {reprlib.repr(entry.get('format'))}, this version of hvd-slowmo reads format "
            f"{FORMAT}. Load it with the version that wrote it."
        )
    saved = parse(entry, Saved, "the state's entry 'slowmo'")
    _check_settings(saved, worker)
    _check_layout(saved, worker.store)
    progress = parse_progress(saved.progress, worker.progress)
    _check_rank(saved, worker)
    _check_in_flight(saved, progress, worker.store)
    inner = unmarked({key: value for key, value in state_dict.items() if key != KEY})
    check_saved(worker.inner, inner)
    text = saved.inner_attributes
    attributes = None if text is None else np.frombuffer(text.encode(errors="replace"), dtype=np.uint8)
    set_attributes = inner_settings.prepare(worker.inner, attributes, attributes_only=True)
    return Loadable(inner, set_attributes, saved, progress)


def restore(loadable: Loadable, worker: TorchWorker) -> None:
    """Load a state that `check` has returned, in place.

    Raises:
        CheckpointError: the inner optimizer is of a class that loads its own state, and refuses this one. Nothing else
            has been changed then.
    """
    store, saved = worker.store, loadable.saved
    try:
        worker.inner.load_state_dict(loadable.inner)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{type(worker.inner).__name__} can't load its state: {spell_error(error)}") from error
    loadable.set_attributes()
    for name, tensors in store.vectors.items():
        for target, source in zip((t for t in tensors if t is not None), saved.vectors[name], strict=True):
            target.copy_(source)
    for name, by_chunk in store.slices.items():
        for index, target in by_chunk.items():
            target.copy_(saved.slices[name][index])
    store.in_flight = {index: x.to(store.segment_of(index).device, copy=True) for index, x in saved.in_flight.items()}
    worker.take_over(
        loadable.progress, None if saved.watch is None else WatchNotes(**msgspec.structs.asdict(saved.watch))
    )
    worker.evaluating = saved.evaluating


def _check_settings(saved: Saved, worker: TorchWorker) -> None:
    present = plain(parse(worker.config.common_facts(), ConfigFacts, "this optimizer's config"))
    for key, value in plain(saved.config).items():
        if present[key] != value:
            raise CheckpointError(
                f"the state was saved with {key}={value!r}, this optimizer has {key}={present[key]!r}. Resume with the "
                "settings of the run that is resumed."
            )
    if saved.size != worker.comm.size:
        raise CheckpointError(f"the state is one of {saved.size} workers, this job has {worker.comm.size}.")


def _check_rank(saved: Saved, worker: TorchWorker) -> None:
    comm, config = worker.comm, worker.config
    if saved.rank == comm.rank:
        return
    if not saved.common:
        never = config.bits < 32 or config.shards
        fix = "a file of optimizer.save()" if never else "save after join(): then rank 0's file serves all"
        raise CheckpointError(
            f"the state is rank {saved.rank}'s own, saved at step {saved.progress['step']}"
            f"{'' if never else ' in the middle of a block'}, and this is rank {comm.rank}. Load each rank's own file, "
            f"or {fix}."
        )
    logger.info("rank %d continues from rank %d's common state", comm.rank, saved.rank)


def _check_layout(saved: Saved, store: TorchStore) -> None:
    parameters = parse(_parameters(store.layout), tuple[_Parameter, ...], "this model")
    for number, (a, b) in enumerate(zip(saved.parameters, parameters, strict=False)):
        if a != b:
            raise CheckpointError(f"parameter {number} of the state is {a}, in this model it is {b}.")
    if len(saved.parameters) != len(parameters):
        raise CheckpointError(
            f"the state has {len(saved.parameters)} parameters, this optimizer has {len(parameters)}."
        )
    if _forms(saved.vectors, saved.slices) != _forms(store.vectors, store.slices):
        raise CheckpointError(
            "the state's vectors are cut otherwise than this model's: put its parameters on the same devices."
        )
    if saved.watch is not None and saved.watch.lengths() != {store.layout.fragments}:
        raise CheckpointError(
            f"the state's 'watch' is of {sorted(saved.watch.lengths())} fragments, here there are "
            f"{store.layout.fragments}."
        )


def _check_in_flight(saved: Saved, progress: Progress, store: TorchStore) -> None:
    launched = progress.flight.launched
    flying = {chunk.index: chunk.size for chunk in store.layout.chunks if len(launched) and launched[chunk.fragment]}
    found = {index: tensor.numel() for index, tensor in saved.in_flight.items()}
    if found != flying or any(x.dim() != 1 or not x.is_floating_point() for x in saved.in_flight.values()):
        raise CheckpointError(
            f"the state's 'in_flight' must have, by chunk, so many numbers: {flying}. Received: {reprlib.repr(found)}"
        )


def _forms(
    vectors: Mapping[str, Sequence[torch.Tensor | None]], slices: Mapping[str, Mapping[int, torch.Tensor]]
) -> tuple[dict[str, list[_Form]], dict[str, dict[int, _Form]]]:
    """Return shapes and types of all vectors and slices."""
    return (
        {name: [(t.shape, t.dtype) for t in parts if t is not None] for name, parts in vectors.items()},
        {name: {index: (x.shape, x.dtype) for index, x in by_chunk.items()} for name, by_chunk in slices.items()},
    )


def _parameters(layout: Layout) -> list[list[Any]]:
    specs = [spec for segment in layout.segments if segment.role == "parameter" for spec in segment.tensors]
    return [[spec.name, list(spec.shape), spec.dtype, group] for spec, group in zip(specs, layout.groups, strict=True)]
