"""Bringing all workers to one start: what they compare, and what they get from each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.core.handshake import agreed
from hvd_slowmo.core.mixing import Graph
from hvd_slowmo.core.startup import Groups, Job, Position, facts_of, hand_out, meet
from hvd_slowmo.wire.parameter_map import ParameterMap
from hvd_slowmo_tf.layout import Placed, Plan
from hvd_slowmo_tf.traced_step import Engine, once
from hvd_slowmo_tf.variables import State


class Prepared(NamedTuple):
    """What a worker has found out on its own."""

    parameter_map: ParameterMap | None
    state: State
    placed: Placed
    plan: Plan


def start(
    comm: Comm,
    optimizer: Any,
    variables: Sequence[Any],
    prepare: Callable[[], Prepared],
    take_graph: Callable[[], Graph | None],
    assemble: Callable[[Prepared, Graph | None, Groups], Engine],
) -> Job:
    """A collective. Raises on every rank what is wrong on one.

    Args:
        comm: the workers.
        optimizer: the SlowMo optimizer.
        variables: the model's.
        prepare: checks what was given, builds the optimizer and lays out what travels.
        take_graph: a collective behind that: who sends to whom, over a gossip base.
        assemble: makes what is traced.
    """
    wrapped = getattr(optimizer.inner_optimizer, "inner_optimizer", optimizer.inner_optimizer)
    remarks = {
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
        "the base optimizer": type(wrapped).__name__,
    }

    def make() -> tuple[Prepared, dict[str, Any]]:
        found = prepare()
        entries = [entry for entry, _ in found.placed]
        return found, facts_of(optimizer.config, "Keras", found.parameter_map, entries, found.plan.layout)

    prepared = agreed(comm, optimizer.name, make, remarks)
    graph = take_graph()
    state = prepared.state
    trained = sum(entry.rule == "slow" for entry, _ in prepared.placed)
    position = Position("Keras", int(state.now.step), int(state.workers.numpy()), (0,) * trained)
    job = meet(comm, optimizer.name, position)
    engine = assemble(prepared, graph, job.groups)
    machine = engine.machine
    if job.fresh:
        own_rate = [v for v in [optimizer._learning_rate] if isinstance(v, keras.Variable)]
        _hand_out(comm, optimizer.name, job, prepared, variables, [*optimizer.inner_optimizer.variables, *own_rate])
        begin = once(lambda: tf.nest.map_structure(tf.convert_to_tensor, machine.start()))
        state.write(engine.call(begin))
    elif job.restored_first:
        _hand_out(comm, optimizer.name, job, prepared, variables, optimizer.variables)
        engine.call(once(lambda: machine.take_from(0, ("slow", "mean", "base"))))
        # What rank 0 had sent to others is no part of what all have now.
        engine.call(once(lambda: state.write(machine.settled(state.read()))))
    state.workers.assign(comm.size)
    return job


def _hand_out(
    comm: Comm, name: str, job: Job, prepared: Prepared, variables: Sequence[Any], state: Sequence[Any]
) -> None:
    """The model's other variables, and the optimizer's state.

    state: the optimizer's variables.
    """
    frozen = [(entry, v) for entry, v in prepared.placed if entry.rule == "frozen"]
    carried = {id(v) for v in (*prepared.plan.variables, *(v for _, v in frozen))}
    # Seed generators keep their own stream on every worker.
    others = [v for v in variables if id(v) not in carried and v.name != "seed_generator_state"]
    theirs = [*others, *state]
    common, own = hand_out(
        comm,
        name,
        job,
        lambda: {entry.name: entry.view.to_wire(v.numpy()) for entry, v in frozen},
        lambda: [v.numpy() for v in theirs],
    )
    if common is not None:
        for entry, v in frozen:
            v.assign(entry.view.to_own(common[entry.name], v.numpy()))
    if own is not None:
        for v, value in zip(theirs, own, strict=True):
            v.assign(value)
