"""Functions of other libraries that call an optimizer for ends of their own."""

from __future__ import annotations

from hvd_slowmo.callers import calling_modules

_DEPTH = 9  # a step is wrapped in up to five functions: profiling, hooks, torch.compile's, a scheduler's count

_REFUSED = {
    "torch.distributed.checkpoint.state_dict": (
        "torch.distributed.checkpoint keeps what every optimizer has, and would lose SlowMo's anchor, momentum and "
        "position. Save with optimizer.save(path), or state_dict() of every rank."
    ),
    "horovod.torch.elastic.state": (
        "hvd.elastic.TorchState would take steps of SlowMo on behalf of its broadcasts, and restores a position that "
        "the workers do not share. Write slowmo.elastic.State(model, optimizer, ...) and @slowmo.elastic.run instead."
    ),
}

_INITIALIZES = "horovod.torch.functions"
_NAMES = {*_REFUSED, _INITIALIZES}


def initializes_state() -> bool:
    """Return whether Horovod's `broadcast_optimizer_state` takes a step, to fill an empty state.

    All workers have one state since the start, so nothing is missing.

    Raises:
        ValueError: as `refuse_foreign_checkpoints`.
    """
    calling = calling_modules(_NAMES, _DEPTH)
    if _INITIALIZES in calling:
        return True
    _refuse(calling)
    return False


def refuse_foreign_checkpoints() -> None:
    """Refuse functions that would save a part of the state only.

    Raises:
        ValueError: one of them calls; it says how to save instead.
    """
    _refuse(calling_modules(_NAMES, _DEPTH))


def _refuse(calling: list[str]) -> None:
    for module in calling:
        if module in _REFUSED:
            raise ValueError(_REFUSED[module])
