"""Parts of a trace that occur many times, traced once.

Python makes each operation of a trace before the first step, and TensorFlow then optimizes it: together about a
millisecond each. A trace has a branch for each fragment, and most of what a branch does is the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import tensorflow as tf

T = TypeVar("T")


class SharedTraces:
    """Functions that are called from many places of a trace.

    Example:
        >>> shared = SharedTraces()
        >>> shared.call("double", lambda x: 2 * x, tf.constant([1.0, 2.0])).numpy().tolist()
        [2.0, 4.0]
    """

    def __init__(self) -> None:
        self._functions: dict[Hashable, Any] = {}

    def call(self, key: Hashable, work: Callable[..., T], *tensors: tf.Tensor) -> T:
        """Return the result of `work`, which depends on nothing but the key and the tensors.

        Outside of a trace, where it would be traced for one call, it is called as it is.
        """
        if not tf.inside_function():
            return work(*tensors)
        if key not in self._functions:
            # Inlined, it would be optimized as often as it is called.
            options = {"_noinline": True}
            self._functions[key] = tf.function(work, autograph=False, experimental_attributes=options)
        result: T = self._functions[key](*tensors)
        return result
