"""SlowMo's part of an optimizer's state_dict, and the checks before any of it is loaded.

Tensors, numbers, strings, lists and dicts only, so that torch.load(weights_only=True) reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.layout import Layout
from hvd_slowmo.core.progress import INTEGERS, Progress
from hvd_slowmo.core.schedule import workers_equal
from hvd_slowmo_torch import inner_settings
from hvd_slowmo_torch.store import TorchStore
from hvd_slowmo_torch.watch import WatchNotes
from hvd_slowmo_torch.worker import TorchWorker

logger = logging.getLogger("hvd_slowmo")

KEY = "slowmo"
FORMAT = 4


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


def check(state_dict: dict[str, Any], config: SlowMoConfig, store: TorchStore, comm: ScopedComm) -> dict[str, Any]:
    """Return the entry "slowmo" of a state_dict, if this worker may continue from it.

    Raises:
        ValueError: the state is not SlowMo's, or is of other settings, another model, another number of workers, or
            another worker alone; the message has the first difference.
    """
    if KEY not in state_dict:
        raise ValueError(
            "this is no state_dict of SlowMo: it has no entry 'slowmo'. To start from a plain optimizer's state, load "
            "it into the inner optimizer before wrapping it."
        )
    saved: dict[str, Any] = state_dict[KEY]
    if saved["format"] != FORMAT:
        raise ValueError(
            f"the state has format {saved['format']}, this version of hvd-slowmo reads format {FORMAT}. Load it with "
            "the version that wrote it."
        )
    for key, value in config.common_facts().items():
        if saved["config"].get(key) != value:
            raise ValueError(
                f"the state was saved with {key}={saved['config'].get(key)!r}, this optimizer has {key}={value!r}. "
                "Resume with the settings of the run that is resumed."
            )
    if saved["size"] != comm.size:
        raise ValueError(f"the state is one of {saved['size']} workers, this job has {comm.size}.")
    _check_layout(saved, store)
    if saved["rank"] != comm.rank:
        if not saved["common"]:
            never = config.bits < 32 or config.shards
            fix = "a file of optimizer.save()" if never else "save after join(): then rank 0's file serves all"
            raise ValueError(
                f"the state is rank {saved['rank']}'s own, saved at step {saved['progress']['step']}"
                f"{'' if never else ' in the middle of a block'}, and this is rank {comm.rank}. Load each rank's own "
                f"file, or {fix}."
            )
        logger.info("rank %d continues from rank %d's common state", comm.rank, saved["rank"])
    return saved


def restore(saved: dict[str, Any], worker: TorchWorker) -> tuple[Progress, WatchNotes | None]:
    """Load checked vectors, in place, and the inner optimizer's attributes; return scalars and the watch's notes."""
    store = worker.store
    text = saved.get("inner_attributes")
    attributes = None if text is None else np.frombuffer(text.encode(), dtype=np.uint8)
    inner_settings.prepare(worker.inner, attributes, attributes_only=True)()
    for name, tensors in store.vectors.items():
        for target, source in zip((t for t in tensors if t is not None), saved["vectors"][name], strict=True):
            target.copy_(source)
    for name, by_chunk in store.slices.items():
        for index, target in by_chunk.items():
            target.copy_(saved["slices"][name][index])
    store.in_flight = {
        index: x.to(store.segment_of(index).device, copy=True) for index, x in saved["in_flight"].items()
    }
    fields = saved["progress"].items()
    progress = Progress.from_flat({field: _array(field, x) for field, x in fields})
    return progress, WatchNotes(**saved["watch"]) if "watch" in saved else None


def _array(field: str, value: Any) -> Any:
    """Return a list as an array of the field's type."""
    return np.array(value, np.int64 if field in INTEGERS else np.float64) if isinstance(value, list) else value


def _check_layout(saved: dict[str, Any], store: TorchStore) -> None:
    layout = store.layout
    parameters = _parameters(layout)
    for number, (a, b) in enumerate(zip(saved["parameters"], parameters, strict=False)):
        if a != b:
            raise ValueError(f"parameter {number} of the state is {_spell(a)}, in this model it is {_spell(b)}.")
    if len(saved["parameters"]) != len(parameters):
        raise ValueError(f"the state has {len(saved['parameters'])} parameters, this optimizer has {len(parameters)}.")
    lengths = {chunk.index: chunk.size for chunk in layout.chunks}
    other_chunks = any(lengths.get(index) != len(tensor) for index, tensor in saved["in_flight"].items())
    if other_chunks or _lengths(saved["vectors"], saved["slices"]) != _lengths(store.vectors, store.slices):
        raise ValueError(
            "the state's vectors are cut otherwise than this model's: put its parameters on the same devices."
        )


def _lengths(
    vectors: Mapping[str, Sequence[torch.Tensor | None]], slices: Mapping[str, Mapping[int, torch.Tensor]]
) -> tuple[dict[str, list[int]], dict[str, dict[int, int]]]:
    """Return the lengths of all vectors and slices."""
    return (
        {name: [len(t) for t in parts if t is not None] for name, parts in vectors.items()},
        {name: {index: len(x) for index, x in by_chunk.items()} for name, by_chunk in slices.items()},
    )


def _parameters(layout: Layout) -> list[list[Any]]:
    specs = [spec for segment in layout.segments if segment.role == "parameter" for spec in segment.tensors]
    return [[spec.name, list(spec.shape), spec.dtype, group] for spec, group in zip(specs, layout.groups, strict=True)]


def _spell(parameter: list[Any]) -> str:
    name, shape, dtype, group = parameter
    return f"{name!r} {tuple(shape)} {dtype} in group {group}"
