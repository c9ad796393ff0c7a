"""What SlowMo adds to an optimizer's state_dict, and the checks before any of it is taken over.

Tensors, numbers, strings, lists and dicts only, so that torch.load(weights_only=True) reads it.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.layout import Layout
from hvd_slowmo.core.progress import Progress
from hvd_slowmo.core.schedule import workers_equal

logger = logging.getLogger("hvd_slowmo")

KEY = "slowmo"
FORMAT = 1

Vectors = dict[str, list[torch.Tensor | None]]


def pack(config: SlowMoConfig, layout: Layout, comm: Comm, progress: Progress, vectors: Vectors) -> dict[str, Any]:
    """The part under the key "slowmo": a worker's scalars and vectors. No communication."""
    return {
        "format": FORMAT,
        "config": config.facts(),
        "rank": comm.rank,
        "size": comm.size,
        "common": workers_equal(config, progress.step, progress.since),
        "progress": {key: np.asarray(value).tolist() for key, value in progress._asdict().items()},
        "parameters": _parameters(layout),
        "vectors": {name: [t for t in tensors if t is not None] for name, tensors in vectors.items()},
    }


def check(state_dict: dict[str, Any], config: SlowMoConfig, layout: Layout, comm: Comm) -> dict[str, Any]:
    """The part under "slowmo", if this worker may continue from it.

    Raises:
        ValueError: it is no state of SlowMo, or one of other settings, another model, another number of workers, or
            another worker's own; the message names the first difference.
    """
    if KEY not in state_dict:
        raise ValueError(
            "this is no state_dict of SlowMo: it has no entry 'slowmo'. To start from a plain optimizer's state, load "
            "it into the base optimizer before wrapping it."
        )
    saved: dict[str, Any] = state_dict[KEY]
    if saved["format"] != FORMAT:
        raise ValueError(f"the state has format {saved['format']}, this version of hvd-slowmo reads format {FORMAT}.")
    for key, value in config.facts().items():
        if saved["config"].get(key) != value:
            raise ValueError(
                f"the state was saved with {key}={saved['config'].get(key)!r}, this optimizer has {key}={value!r}. "
                "Resume with the settings of the run that is resumed."
            )
    if saved["size"] != comm.size:
        raise ValueError(f"the state is one of {saved['size']} workers, this job has {comm.size}.")
    for number, (a, b) in enumerate(zip(saved["parameters"], _parameters(layout), strict=False)):
        if a != b:
            raise ValueError(f"parameter {number} of the state is {_spell(a)}, in this model it is {_spell(b)}.")
    if len(saved["parameters"]) != len(_parameters(layout)):
        raise ValueError(
            f"the state has {len(saved['parameters'])} parameters, this optimizer has {len(_parameters(layout))}."
        )
    sizes = [s.size for s in layout.segments if s.rule == "slow"]
    if any([len(t) for t in tensors] != sizes for tensors in saved["vectors"].values()):
        raise ValueError(
            "the state's vectors are cut otherwise than this model's: put its parameters on the same devices."
        )
    if saved["rank"] != comm.rank:
        if not saved["common"]:
            raise ValueError(
                f"the state is rank {saved['rank']}'s own, saved at step {saved['progress']['step']} in the middle of "
                f"a block, and this is rank {comm.rank}. Load each rank's own file, or save after join(): then "
                "rank 0's file serves all."
            )
        logger.info("rank %d continues from rank %d's common state", comm.rank, saved["rank"])
    return saved


def restore(saved: dict[str, Any], vectors: Vectors) -> Progress:
    """Take over checked vectors, in place, and return the scalars."""
    for name, tensors in vectors.items():
        for target, source in zip((t for t in tensors if t is not None), saved["vectors"][name], strict=True):
            target.copy_(source)
    scalars = saved["progress"]
    vectors_of = {key: np.array(value) if isinstance(value, list) else value for key, value in scalars.items()}
    return Progress(**vectors_of)


def _parameters(layout: Layout) -> list[list[Any]]:
    return [[e.name, list(e.shape), e.dtype, e.group] for s in layout.segments if s.rule == "slow" for e in s.entries]


def _spell(parameter: list[Any]) -> str:
    name, shape, dtype, group = parameter
    return f"{name!r} {tuple(shape)} {dtype} in group {group}"
