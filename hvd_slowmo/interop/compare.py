"""Comparing a PyTorch model and its Keras version: outputs and gradients of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.wire.tensors import TensorSpec

# The adapters are imported within functions, so that this module can be imported without a framework. PyTorch comes
# first: the other way round its libraries may not load.


class Difference(NamedTuple):
    """The difference of two arrays.

    Example:
        >>> Difference("output", largest=1e-7, scale=2.0, bound=2e-4).more_than_rounding
        False
    """

    name: str
    largest: float  # the largest absolute difference
    scale: float  # the largest absolute value
    bound: float  # the largest difference that rounding explains

    @property
    def more_than_rounding(self) -> bool:
        """True if rounding does not explain the difference, and for NaN."""
        return not self.largest <= self.bound


def compare(
    torch_model: Any,
    torch_specs: Sequence[TensorSpec],
    keras_model: Any,
    keras_specs: Sequence[TensorSpec],
    inputs: Sequence[NDArray[Any]],
    seed: int = 0,
) -> tuple[Difference, list[Difference]]:
    """Run both models on the same batch, without dropout and with BatchNorm's moving statistics.

    Args:
        torch_specs, keras_specs: the models' tensors, as they travel.
        inputs: as Keras takes them, channels last. PyTorch gets those channels first that Keras' graph shows to be
            feature maps or, in a model without a graph, those with more than three axes.
        seed: of the weights of the sum.

    Returns:
        The difference of the outputs, and for each trained tensor that of the gradients of one weighted sum of all
        outputs, in the wire's orientation.

    Raises:
        ValueError: the outputs have different shapes.

    Example:
        >>> import torch, keras
        >>> from hvd_slowmo_torch.interop.layers import entries_torch
        >>> from hvd_slowmo_tf.interop.layers import entries_keras
        >>> from hvd_slowmo.interop.copy import copy_to_keras
        >>> torch_model = torch.nn.Linear(2, 1)
        >>> keras_model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> copy_to_keras(torch_model, keras_model)
        >>> torch_specs, keras_specs = entries_torch(torch_model), entries_keras(keras_model)
        >>> batch = np.ones((3, 2), "float32")
        >>> output, gradients = compare(torch_model, torch_specs, keras_model, keras_specs, [batch])
        >>> output.more_than_rounding, len(gradients)
        (False, 2)
    """
    from hvd_slowmo_torch.interop.gradients import outputs_and_gradients as outputs_and_gradients_of_torch

    # isort: split
    from hvd_slowmo_tf.interop.feature_order import feature_maps
    from hvd_slowmo_tf.interop.gradients import channels_first
    from hvd_slowmo_tf.interop.gradients import outputs_and_gradients as outputs_and_gradients_of_keras

    input_maps, output_maps = feature_maps(keras_model)
    transposed = input_maps or [x.ndim > 3 for x in inputs]
    torch_trained = [spec for spec in torch_specs if spec.role == "parameter"]
    names = {spec.name for spec in torch_trained}
    keras_trained = [spec for spec in keras_specs if spec.name in names]
    torch_inputs = [channels_first(x) if first else x for x, first in zip(inputs, transposed, strict=True)]
    torch_output, weights, torch_gradients = outputs_and_gradients_of_torch(
        torch_model, torch_trained, torch_inputs, seed
    )
    keras_output, keras_gradients = outputs_and_gradients_of_keras(
        keras_model, keras_trained, inputs, weights, output_maps[0] if output_maps else None
    )
    overall = max((float(np.abs(g).max(initial=0)) for g in torch_gradients.values()), default=0.0)
    gradients = [
        _difference(name, gradient, keras_gradients[name], overall * 1e-3) for name, gradient in torch_gradients.items()
    ]
    return _difference("output", torch_output, keras_output), gradients


def _difference(name: str, a: NDArray[Any], b: NDArray[Any], least: float = 0.0) -> Difference:
    """Return the difference; rounding explains 1000 units in the last place of the largest value, or of `least`.

    Sums are long.
    """
    largest = float(np.abs(a - b).max(initial=0))
    scale = float(np.abs(a).max(initial=0))
    return Difference(name, largest, scale, 1000 * float(np.finfo(a.dtype).eps) * max(scale, least))
