"""Bringing all workers to one start: what they compare, and what they get from rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvd_slowmo.comm import Comm
from hvd_slowmo.handshake import agreed
from hvd_slowmo_tf.engine import Engine, once


def start(
    comm: Comm,
    optimizer: Any,
    variables: Sequence[Any],
    prepare: Callable[[], Engine],
    take_graph: Callable[[Engine], Engine],
) -> None:
    """A collective. Raises on every rank what is wrong on one.

    Args:
        comm: the workers.
        optimizer: the SlowMo optimizer.
        variables: the model's.
        prepare: checks what was given, builds the optimizer and lays out what travels.
        take_graph: a collective behind that: who sends to whom, over a gossip base.
    """
    wrapped = getattr(optimizer.inner_optimizer, "inner_optimizer", optimizer.inner_optimizer)
    remarks = {
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
        "the inner optimizer": type(wrapped).__name__,
    }

    def make() -> tuple[Engine, dict[str, Any]]:
        prepared = prepare()
        return prepared, prepared.facts

    engine = agreed(comm, optimizer.name, make, remarks)
    engine = take_graph(engine)
    state = engine.state
    positions = comm.gather(f"{optimizer.name}.position", (int(state.now.step), int(state.workers.numpy())))
    steps = [step for step, _ in positions]
    _refuse_other_worlds(comm, optimizer.name, positions)
    carried = {id(v) for found in engine.plan.variables for v in found}
    # Seed generators keep their own stream on every worker.
    others = [v for v in variables if id(v) not in carried and v.name != "seed_generator_state"]
    own_rate = [v for v in [optimizer._learning_rate] if isinstance(v, keras.Variable)]
    machine = engine.machine
    if not any(steps):
        _hand_out(comm, optimizer.name, [*others, *optimizer.inner_optimizer.variables, *own_rate])
        begin = once(lambda: tf.nest.map_structure(tf.convert_to_tensor, machine.start()))
        state.write(engine.call(begin))
    elif not any(steps[1:]):
        _hand_out(comm, optimizer.name, [*others, *optimizer.variables])
        engine.call(once(lambda: machine.take_from(0, ("slow", "mean", "base"))))
        # What rank 0 had sent to others is no part of what all have now.
        engine.call(once(lambda: state.write(machine.settled(state.read()))))
    elif len(set(steps)) > 1:
        here = ", ".join(f"rank {r} step {s}" for r, s in zip(comm.ranks, steps, strict=True))
        raise ValueError(
            f"{optimizer.name}: the workers are not at the same step: {here}. Load a checkpoint on rank 0 alone, or "
            "files of the same step on every rank."
        )
    state.workers.assign(comm.size)


def _refuse_other_worlds(comm: Comm, name: str, positions: list[tuple[int, int]]) -> None:
    for rank, (step, saved) in zip(comm.ranks, positions, strict=True):
        if step and saved not in (0, comm.size):
            raise ValueError(f"{name}: the state on rank {rank} is one of {saved} workers, this job has {comm.size}.")


def _hand_out(comm: Comm, name: str, variables: list[Any]) -> None:
    """Rank 0's values for everybody."""
    mine = [v.numpy() for v in variables] if comm.rank == 0 else None
    values = comm.gather(f"{name}.start", mine)[0]
    if comm.rank != 0:
        for v, value in zip(variables, values, strict=True):
            v.assign(value)
