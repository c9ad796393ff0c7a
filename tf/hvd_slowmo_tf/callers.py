"""Functions of Horovod that broadcast or restore a Keras optimizer's variables."""

from __future__ import annotations

from hvd_slowmo.callers import calling_modules

_ELASTIC = "horovod.tensorflow.elastic"


def refuse_foreign_broadcasts() -> None:
    """Refuse Horovod's elastic state, which asks SlowMo for its variables to broadcast and restore them.

    Only the function that asks itself counts: a training run within `hvd.elastic.run` may read them.

    Raises:
        ValueError: it says what to use instead.
    """
    if _ELASTIC in calling_modules({_ELASTIC}, depth=1):
        raise ValueError(
            "hvd.elastic.KerasState would give every worker rank 0's variables of SlowMo, and restores a position that "
            "the workers do not share. Save with optimizer.save(path), and call optimizer.load(path) after a restart."
        )
