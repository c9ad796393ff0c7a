"""Comparison of a checkpoint's facts with the model and the training that load it."""

from __future__ import annotations

from hvd_slowmo.checkpoint.facts import Kind, ModelFacts, TensorFacts, TrainingFacts, parse, plain
from hvd_slowmo.checkpoint.naming import NamedTensors
from hvd_slowmo.checkpoint.state import WorkerState, facts_of
from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.errors import CheckpointError
from hvd_slowmo.wire.tensors import describe

KINDS: dict[Kind, str] = {
    "model": "parameters and statistics",
    "anchor": "anchor",
    "v": "slow momentum",
    "residual": "residual of few bits",
    "slice_residual": "residual of a slice",
    "average": "moving average of the weights",
    "push": "push-sum weights and numerators",
    "sent": "messages in flight",
    "in_flight": "values in flight",
    "progress": "position",
    "optimizer_state": "inner optimizer state",
}
"""The first parts of the arrays' names, in words."""

_SAVE_LATER = "Save right after join(), or an outer step without fragments and delay, with average=True."
_SHARE_STATE = "Inner state is common with inner_state='reset' or 'average', right after an outer step."


def check_model(tensors: NamedTensors, saved: ModelFacts) -> None:
    """Refuse a checkpoint of another model, by its facts.

    Raises:
        CheckpointError: the message has the first tensor that differs.
    """
    if saved.naming != tensors.naming:
        raise CheckpointError(
            f"the checkpoint has its tensors by {_spell_naming(saved.naming)}, here they are by "
            f"{_spell_naming(tensors.naming)}: {saved.reason or tensors.reason} A ParameterMap for both makes the "
            "names the same."
        )
    specs = parse(describe(tensors.specs), tuple[TensorFacts, ...], "this model")
    for number, (a, b) in enumerate(zip(saved.tensors, specs, strict=False)):
        if a != b:
            raise CheckpointError(
                f"the checkpoint is of another model: its tensor {number} is {_spell(a)}, here it is {_spell(b)}."
            )
    if len(saved.tensors) != len(specs):
        raise CheckpointError(
            f"the checkpoint is of another model: it has {len(saved.tensors)} tensors, here there are {len(specs)}."
        )


def check_training(state: WorkerState, comm: ScopedComm, saved: TrainingFacts) -> None:
    """Refuse a checkpoint of another training, or one that another number of workers can't continue.

    Raises:
        CheckpointError: the message has the first difference.
    """
    facts, config = facts_of(state), plain(saved.config)
    for key, value in facts["config"].items():
        if config[key] != value:
            raise CheckpointError(
                f"the checkpoint was saved with {key}={config[key]!r}, this optimizer has {key}={value!r}. Resume with "
                "the settings of the run that is resumed."
            )
    check_model(state.tensors, saved)
    if list(saved.trained) != facts["trained"]:
        odd = sorted(set(saved.trained) ^ set(facts["trained"]))
        raise CheckpointError(f"not the same tensors are trained as in the checkpoint: {', '.join(odd[:3])}.")
    if list(saved.vectors) != facts["vectors"]:
        raise CheckpointError(
            f"the checkpoint has {', '.join(saved.vectors) or 'nothing'} beside the model, this optimizer keeps "
            f"{', '.join(facts['vectors']) or 'nothing'}."
        )
    if saved.workers != comm.size:
        _check_resize(comm, saved)
    elif "push" in saved.per_worker and saved.graph != facts["graph"]:
        raise CheckpointError("the checkpoint was saved with another topology: its function gives another graph now.")


def _check_resize(comm: ScopedComm, saved: TrainingFacts) -> None:
    kinds = [kind for kind in saved.per_worker if kind not in ("residual", "slice_residual")]
    if kinds:
        fixes = [_SAVE_LATER] if kinds != ["optimizer_state"] else []
        fixes += [_SHARE_STATE] if "optimizer_state" in kinds else []
        raise CheckpointError(
            f"the checkpoint is one of {saved.workers} workers, this job has {comm.size}, and each of those has its "
            f"own {', '.join(KINDS[kind] for kind in kinds)}, which would be lost. {' '.join(fixes)}"
        )


def _spell_naming(naming: str) -> str:
    return "the names of a ParameterMap" if naming == "wire" else f"the names of {naming} alone"


def _spell(tensor: TensorFacts) -> str:
    note = f", {tensor.note}" if tensor.note else ""
    return f"{tensor.name} ({tensor.role}, {tensor.dtype}, shape {tensor.shape}{note})"
