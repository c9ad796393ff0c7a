"""Horovod as the core's `Comm`, within TensorFlow's traces.

Tensors travel under the names that horovod.torch gives them, so that workers of both frameworks can meet. TensorFlow
has names in a tf.function only: a collective's is its node's, without the scopes around it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hvd_slowmo.comm.horovod import HorovodFailures, Workers
from hvd_slowmo.comm.naming import family
from hvd_slowmo.comm.protocol import Comm

T = TypeVar("T")


_COLLECTIVE = re.compile(r"Horovod has been shut down|\{\{node [^}]*(allreduce|allgather|alltoall|broadcast|Horovod)")


def lost_worker(error: Exception) -> bool:
    """Return whether an error of TensorFlow's is that of a collective of Horovod.

    Example:
        >>> lost_worker(tf.errors.UnknownError(None, None, "[[{{node allreduce.slowmo.ledger}}]]"))
        True
        >>> lost_worker(tf.errors.UnknownError(None, None, "train_horovod.py [[{{node PyFunc}}]]"))
        False
    """
    if not isinstance(error, (tf.errors.UnknownError, tf.errors.FailedPreconditionError)):
        return False
    return _COLLECTIVE.search(error.message) is not None


class HorovodComm:
    """Collectives of a Horovod process set. After Horovod's error nothing more is submitted.

    Args:
        process_set: Horovod's.
        node: the workers of this one's node, for gradients="node".
    """

    def __init__(self, process_set: Any, node: Comm | None = None) -> None:
        import horovod.tensorflow as hvd

        self._hvd = hvd
        self._set = process_set
        self.rank: int = process_set.rank()
        self.size: int = process_set.size()
        self.ranks: Sequence[int] = tuple(process_set.ranks or range(self.size))
        self.node = node
        self.family = family("horovod", self.ranks)
        self.failures = HorovodFailures(hvd.rank(), self.ranks)
        self._gathers: dict[str, Any] = {}  # per name, the traced function that gathers under it

    def start_sum(self, name: str, x: tf.Tensor) -> tf.Tensor:
        options = {"op": self._hvd.Sum, "process_set": self._set, "ignore_name_scope": True}
        return self._hvd.allreduce(x, name=f"allreduce.{name}", **options)

    def start_push(self, name: str, x: tf.Tensor, shares: tf.Tensor) -> tf.Tensor:
        weights = shares[:, self.rank]
        # Horovod has no send and receive; an alltoall with nothing for most workers puts no more on the wire.
        sent = tf.reshape(tf.cast(tf.boolean_mask(weights, weights > 0), x.dtype)[:, tf.newaxis] * x, [-1])
        splits = tf.cast(weights > 0, tf.int32) * x.shape[0]
        options = {"process_set": self._set, "ignore_name_scope": True}
        received, _ = self._hvd.alltoall(sent, splits, name=f"alltoall.{name}", **options)
        return tf.reduce_sum(tf.reshape(received, [-1, x.shape[0]]), axis=0)

    def start_alltoall(self, name: str, parts: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        lengths = [part.shape[0] for part in parts]
        options = {"process_set": self._set, "ignore_name_scope": True}
        received, _ = self._hvd.alltoall(
            tf.concat(parts, 0), tf.constant(lengths, tf.int32), name=f"alltoall.{name}", **options
        )
        came: list[tf.Tensor] = tf.split(received, [lengths[self.rank]] * self.size)
        return came

    def start_allgather(self, name: str, x: tf.Tensor, lengths: Sequence[int]) -> list[tf.Tensor]:
        options = {"process_set": self._set, "ignore_name_scope": True}
        everything = self._hvd.allgather(x, name=f"allgather.{name}", **options)
        came: list[tf.Tensor] = tf.split(everything, list(lengths))
        return came

    def open_beside(self) -> None:
        """Do nothing: a trace has no other threads."""

    def start_beside(self, work: Callable[[Comm], T]) -> T:
        return work(self)

    def wait(self, handle: T) -> T:
        return handle

    def gather(self, name: str, item: Any) -> list[Any]:
        self.failures.refuse_after_failure()
        sent = np.frombuffer(pickle.dumps(item), dtype=np.uint8)
        lengths = self._gathered(f"{name}.length", np.array([len(sent)], dtype=np.int64))
        everything = self._gathered(name, sent)
        return [pickle.loads(part.tobytes()) for part in np.split(everything, np.cumsum(lengths)[:-1])]

    def _gathered(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        def gather(x: tf.Tensor) -> tf.Tensor:
            options = {"process_set": self._set, "ignore_name_scope": True}
            return self._hvd.allgather(x, name=f"allgather.{name}", **options)

        if name not in self._gathers:
            # Without get_concrete_function TensorFlow would warn: a function of many names looks like one that is
            # traced at every call.
            traced = tf.function(gather, input_signature=[tf.TensorSpec([None], values.dtype)], autograph=False)
            self._gathers[name] = traced.get_concrete_function()
        try:
            result: NDArray[Any] = self._gathers[name](tf.constant(values)).numpy()
        except (tf.errors.UnknownError, tf.errors.FailedPreconditionError) as error:
            raise self.failures.explain(error, name) from error
        return result


workers = Workers("horovod.tensorflow", "TensorFlow", "hvd_slowmo.tf", HorovodComm)
