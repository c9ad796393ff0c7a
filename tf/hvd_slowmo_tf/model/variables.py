"""The state between two steps as Keras variables: the scalars of the state machine, the anchor and v."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import keras
import tensorflow as tf

from hvd_slowmo.core.parts.layout import Chunk, Layout
from hvd_slowmo.core.parts.progress import FIELDS, INTEGERS, PER_FRAGMENT, PER_GROUP, Flight, Observed, Progress
from hvd_slowmo.core.parts.slices import OwnSlices
from hvd_slowmo.core.regroup.dealing import Owner
from hvd_slowmo.core.start.graph import Graph


class OptimizerVariables:
    """SlowMo's own variables; made once, when the optimizer is built.

    Args:
        add_variable: keras.optimizers.Optimizer's.
        layout: of the parameters.
        vectors: names of the vectors that are kept beside the parameters.
        weights: number of push-sum weights: one per worker with gossip, else none.
        late: exchanges may be in flight between two steps.
        slices: the worker's.
        on_host: keep anchor, momentum and residuals in host memory.

    Attributes:
        scalars: `Progress.flat()`, a variable per name.
        workers: number of workers of the job; 0 before it has started.
        rank: place of the worker among them, whose slices these are.
        entered: inner steps at which the parameters were given values from outside, where a saved state has to tell of
            these; else -1. Of this process's values `Fingerprint` knows.
        made: inner steps that this worker has made, in an elastic job: one more than `step` while the exchange behind
            the last one is not over. No part of a saved state.
        vectors: per name, a flat variable for each chunk of parameters, by its number.
        slices: per name, one for the worker's slice of each chunk of which it keeps that alone.
    """

    def __init__(
        self,
        add_variable: Callable[..., keras.Variable],
        layout: Layout,
        vectors: Sequence[str],
        weights: int,
        late: bool = False,
        slices: OwnSlices | None = None,
        on_host: bool = False,
    ) -> None:
        fragments = layout.fragments
        shapes: dict[str, tuple[int, ...]] = {
            "observed": (len(Observed._fields),),
            "weights": (weights,),
            "arriving": (weights,),
            **dict.fromkeys(PER_FRAGMENT, (fragments,)),
            **dict.fromkeys(Flight._fields, (fragments if late else 0,)),
        }
        for field in PER_GROUP:
            shapes[field] += (1,)  # Keras has one group of parameters; see `regroup`
        self.scalars = {
            field: add_variable(
                shape=shapes.get(field, ()),
                dtype="float64" if field in shapes and field not in INTEGERS else "int64",
                initializer="ones" if field == "weights" else "zeros",
                name=field,
            )
            for field in FIELDS
        }
        self.workers = add_variable(shape=(), dtype="int64", name="workers")
        self.rank = add_variable(shape=(), dtype="int64", name="rank")
        self.entered = add_variable(
            shape=(), dtype="int64", initializer=keras.initializers.Constant(-1), name="entered"
        )
        self.made = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._layout, self._on_host = layout, on_host
        own = {} if slices is None else slices.allocations()

        def flat(name: str, chunk: Chunk, length: int) -> keras.Variable:
            dtype = layout.segments[chunk.segment].dtype
            with self._place_of(name):
                return add_variable(shape=(length,), dtype=dtype, name=f"{name}_{chunk.index}")

        self.vectors = {
            vector: {
                chunk.index: flat(vector, chunk, chunk.size)
                for chunk in layout.parameter_chunks
                if chunk.index not in own.get(vector, ())
            }
            for vector in vectors
        }
        self.slices = {
            vector: {chunk: flat(vector, layout.chunks[chunk], length) for chunk, length in lengths.items()}
            for vector, lengths in own.items()
        }
        self._lengths = [chunk.size for chunk in layout.parameter_chunks]

    def _place_of(self, name: str) -> AbstractContextManager[object]:
        kept = self._on_host and name in ("anchor", "v", "residual", "slice_residual")
        device: AbstractContextManager[object] = tf.device("CPU:0") if kept else nullcontext()
        return device

    def divide(self, slices: OwnSlices, variables: list[keras.Variable]) -> None:
        """Make room for other slices of the worker, with zeros.

        The new variables take the places of the old ones among `variables`, the optimizer's.
        """
        for name, lengths in slices.allocations().items():
            for chunk, length in lengths.items():
                with self._place_of(name):
                    self.slices[name][chunk] = _replaced(self.slices[name][chunk], (length,), variables)

    def gossip_over(self, graph: Graph, variables: list[keras.Variable]) -> None:
        """Make room for the weights and vectors of another graph, and free the former one's.

        New ones take the places of old ones among `variables`, the optimizer's, or stand behind them.
        """
        for field in ("weights", "arriving"):
            if self.scalars[field].shape != (graph.size,):
                self.scalars[field] = _replaced(self.scalars[field], (graph.size,), variables)
        for name in ("push", "sent"):
            if name not in graph.vectors:
                for v in self.vectors.pop(name, {}).values():
                    del variables[_index(v, variables)]
            elif name not in self.vectors:
                self.vectors[name] = {chunk.index: self._new(name, chunk) for chunk in self._layout.parameter_chunks}
                variables += self.vectors[name].values()

    def _new(self, name: str, chunk: Chunk) -> keras.Variable:
        dtype = self._layout.segments[chunk.segment].dtype
        zeros = tf.zeros((chunk.size,), dtype)
        return keras.Variable(zeros, dtype=dtype, trainable=False, name=f"{name}_{chunk.index}")

    @property
    def owner(self) -> Owner:
        """Whose slices these are."""
        return int(self.rank.numpy()), int(self.workers.numpy())

    def belong_to(self, rank: int, workers: int) -> None:
        """Note whose state this is."""
        self.rank.assign(rank)
        self.workers.assign(workers)

    def fit(self, layout: Layout) -> bool:
        """Return whether the chunks of a layout have the lengths for which these were made."""
        return self._lengths == [chunk.size for chunk in layout.parameter_chunks]

    def regroup(self, groups: int, variables: list[keras.Variable]) -> None:
        """Keep learning rates of so many groups, where workers of another framework have several.

        The new variables take the places of the old ones among `variables`, the optimizer's.
        """
        for field in PER_GROUP:
            old = self.scalars[field]
            shape = (old.shape[0], groups)
            if old.shape != shape:
                self.scalars[field] = _replaced(old, shape, variables)

    def read(self) -> Progress:
        """Return the scalar state; in a trace."""
        return Progress.from_flat({field: v._value.value() for field, v in self.scalars.items()})

    def write(self, progress: Progress) -> None:
        """Replace the scalar state, also in a trace."""
        for field, value in progress.flat().items():
            self.scalars[field].assign(value)

    def steps(self) -> int:
        """Return the inner steps completed; not in a trace."""
        return int(self.scalars["step"].numpy())

    @property
    def now(self) -> Progress:
        """The scalar state as NumPy values."""
        return Progress.from_flat({field: v.numpy() for field, v in self.scalars.items()})


def _replaced(old: keras.Variable, shape: tuple[int, ...], variables: list[keras.Variable]) -> keras.Variable:
    """Return a variable of another shape, with zeros, that has taken an old one's place among others."""
    with tf.init_scope():
        new = keras.Variable(tf.zeros(shape, old.dtype), dtype=old.dtype, trainable=False, name=old.name)
    variables[_index(old, variables)] = new
    return new


def _index(variable: keras.Variable, variables: list[keras.Variable]) -> int:
    return next(n for n, v in enumerate(variables) if v is variable)
