"""All that SlowMo keeps between steps, as Keras variables: the scalars of the state machine, the anchor and v."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvd_slowmo.core.layout import Layout
from hvd_slowmo.core.progress import Observed, Progress


class State:
    """Made once, when the optimizer is built.

    Args:
        add_variable: keras.optimizers.Optimizer's.
        layout: of the model.
        vectors: names of what is kept beside the parameters: a flat variable for each chunk of them.
        weights: how many push-sum weights there are: one per worker over a gossip base, else none.
    """

    def __init__(self, add_variable: Callable[..., Any], layout: Layout, vectors: Sequence[str], weights: int) -> None:
        # Keras has one group of parameters; see `regroup`.
        lengths = {"rates": 1, "gamma": 1, "observed": len(Observed._fields), "w": weights, "arriving": weights}
        self.scalars = [
            add_variable(
                shape=(lengths[field],) if field in lengths else (),
                dtype="float64" if field in lengths else "int64",
                initializer="ones" if field == "w" else "zeros",
                name=field,
            )
            for field in Progress._fields
        ]
        self.workers = add_variable(shape=(), dtype="int64", name="workers")  # of the job; 0 before it starts
        self.vectors = {
            vector: [
                add_variable(
                    shape=(chunk.size,), dtype=layout.segments[chunk.segment].dtype, name=f"{vector}_{chunk.index}"
                )
                for chunk in layout.chunks
                if chunk.rule == "slow"
            ]
            for vector in vectors
        }

    def regroup(self, groups: int, variables: list[Any]) -> None:
        """Have rates for so many groups, where workers of another framework have several.

        variables: the optimizer's, among which the new ones take the places of the old.
        """
        for field in ("rates", "gamma"):
            at = Progress._fields.index(field)
            old = self.scalars[at]
            if old.shape != (groups,):
                with tf.init_scope():
                    new = keras.Variable(tf.zeros([groups], tf.float64), dtype="float64", trainable=False, name=field)
                self.scalars[at] = new
                variables[next(n for n, v in enumerate(variables) if v is old)] = new

    def read(self) -> Progress:
        """In a trace."""
        return Progress(*[v._value.read_value() for v in self.scalars])

    def write(self, progress: Progress) -> None:
        """In a trace."""
        for v, value in zip(self.scalars, progress, strict=True):
            v.assign(value)

    @property
    def now(self) -> Progress:
        """As NumPy values."""
        return Progress(*[v.numpy() for v in self.scalars])
