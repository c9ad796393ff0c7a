"""One batch through a PyTorch model and its Keras version: how far outputs and gradients are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.wire.tensors import TensorSpec

# The adapters are imported where they are used: a core without frameworks can still import this.


class Difference(NamedTuple):
    """How far two tensors are apart."""

    name: str
    largest: float  # the largest absolute difference
    scale: float  # the largest absolute value
    bound: float  # what rounding explains

    @property
    def more_than_rounding(self) -> bool:
        """Whether the difference is none of rounding; a NaN is one."""
        return not self.largest <= self.bound


def compare(
    torch_model: Any,
    torch_entries: Sequence[TensorSpec],
    keras_model: Any,
    keras_entries: Sequence[TensorSpec],
    inputs: Sequence[NDArray[Any]],
    transposed: Sequence[bool] | None = None,
    seed: int = 0,
) -> tuple[Difference, list[Difference]]:
    """Run both models on the same batch, without dropout and with BatchNorm's moving statistics.

    Args:
        inputs: as Keras takes them, channels last.
        transposed: per input, whether PyTorch takes it channels first; None: as Keras' graph says, or, without one,
            whether it has more than three axes.

    Returns:
        The difference of the outputs, and for each trained entry that of the gradients of one weighted sum of all
        outputs, in the wire's orientation.

    Raises:
        ValueError: outputs of different shapes.
    """
    # PyTorch first: the other way round its libraries may not load.
    from hvd_slowmo_torch.interop.gradients import outputs_and_gradients as of_torch

    # isort: split
    from hvd_slowmo_tf.interop.feature_order import feature_maps
    from hvd_slowmo_tf.interop.gradients import outputs_and_gradients as of_keras

    maps, output_maps = feature_maps(keras_model)
    if transposed is None:
        transposed = maps or [x.ndim > 3 for x in inputs]
    slow = [entry for entry in torch_entries if entry.rule == "slow"]
    names = {entry.name for entry in slow}
    given = [channels_first(x) if first else x for x, first in zip(inputs, transposed, strict=True)]
    ours, weights, our_gradients = of_torch(torch_model, slow, given, seed)
    output_transposed = output_maps[0] if output_maps else None
    their_slow = [entry for entry in keras_entries if entry.name in names]
    theirs, their_gradients = of_keras(keras_model, their_slow, inputs, weights, output_transposed)
    overall = max((float(np.abs(g).max(initial=0)) for g in our_gradients.values()), default=0.0)
    gradients = [_difference(n, our_gradients[n], their_gradients[n], overall * 1e-3) for n in our_gradients]
    return _difference("output", ours, theirs), gradients


def channels_first(x: NDArray[Any]) -> NDArray[Any]:
    """As PyTorch has what Keras has channels last."""
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def _difference(name: str, ours: NDArray[Any], theirs: NDArray[Any], least: float = 0.0) -> Difference:
    """Rounding explains a thousand units in the last place of the largest value, or of `least`: sums are long."""
    largest = float(np.abs(ours - theirs).max(initial=0))
    scale = float(np.abs(ours).max(initial=0))
    return Difference(name, largest, scale, 1000 * float(np.finfo(ours.dtype).eps) * max(scale, least))
