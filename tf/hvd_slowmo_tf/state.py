"""All that SlowMo keeps between steps, as Keras variables: the scalars of the state machine, the anchor and v."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hvd_slowmo.layout import Segment
from hvd_slowmo.machine import Observed, Progress

_SHAPES = {"rates": (1,), "gamma": (1,), "observed": (len(Observed._fields),)}  # Keras has one group of parameters


class State:
    """Made once, when the optimizer is built.

    Args:
        add_variable: keras.optimizers.Optimizer's.
        segments: of parameters.
        vectors: names of what is kept beside the parameters: a flat variable per segment.
    """

    def __init__(self, add_variable: Callable[..., Any], segments: Sequence[Segment], vectors: Sequence[str]) -> None:
        self.scalars = [
            add_variable(shape=_SHAPES.get(field, ()), dtype="float64" if field in _SHAPES else "int64", name=field)
            for field in Progress._fields
        ]
        self.workers = add_variable(shape=(), dtype="int64", name="workers")  # of the job; 0 before it starts
        self.vectors = {
            vector: [
                add_variable(shape=(s.size,), dtype=s.dtype, name=f"{vector}_{number}")
                for number, s in enumerate(segments)
            ]
            for vector in vectors
        }

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
