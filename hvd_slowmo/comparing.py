"""One batch through a PyTorch model and its Keras version: how far outputs and gradients are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.wire import WireEntry

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
    torch_entries: Sequence[WireEntry],
    keras_model: Any,
    keras_entries: Sequence[WireEntry],
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
    import torch

    # isort: split
    import keras
    import tensorflow as tf

    from hvd_slowmo_tf.flattening import feature_maps
    from hvd_slowmo_tf.weights import read_keras
    from hvd_slowmo_torch.weights import read_torch

    maps, output_maps = feature_maps(keras_model)
    if transposed is None:
        transposed = maps or [x.ndim > 3 for x in inputs]
    slow = [entry for entry in torch_entries if entry.rule == "slow"]
    names = {entry.name for entry in slow}
    given_ours = [torch.from_numpy(_first(x) if first else x) for x, first in zip(inputs, transposed, strict=True)]
    was_training = torch_model.training
    torch_model.eval()
    before = {name: p.grad for name, p in torch_model.named_parameters()}
    try:
        torch_model.zero_grad(set_to_none=True)
        ours = torch_model(*given_ours)
        ours = ours[0] if isinstance(ours, tuple) else ours  # recurrent layers give their states too
        weights = np.random.default_rng(seed).standard_normal(tuple(ours.shape)).astype(str(ours.dtype)[6:])
        (ours * torch.from_numpy(weights)).sum().backward()
        our_gradients = read_torch(torch_model, slow, gradients=True)
    finally:
        torch_model.train(was_training)
        for name, p in torch_model.named_parameters():
            p.grad = before[name]
    with tf.GradientTape() as tape:
        theirs = keras_model([tf.constant(x) for x in inputs] if len(inputs) > 1 else inputs[0], training=False)
        theirs = theirs[0] if isinstance(theirs, (tuple, list)) else theirs
        theirs = keras.ops.convert_to_tensor(theirs)
        shape = tuple(ours.shape)
        output_transposed = output_maps[0] if output_maps else tuple(theirs.shape) != shape
        given = _shape_first(tuple(theirs.shape)) if output_transposed else tuple(theirs.shape)
        if given != shape:
            raise ValueError(f"PyTorch's output has shape {shape}, Keras' {tuple(theirs.shape)}.")
        total = tf.reduce_sum(theirs * tf.constant(_last(weights) if output_transposed else weights, theirs.dtype))
    trained = keras_model.trainable_variables
    found = tape.gradient(total, [v.value for v in trained], unconnected_gradients="zero")
    gradients = {v.path: tf.convert_to_tensor(g) for v, g in zip(trained, found, strict=True)}
    their_gradients = read_keras(gradients, [e for e in keras_entries if e.name in names])
    theirs = _first(theirs.numpy()) if output_transposed else theirs.numpy()
    outputs = _difference("output", ours.detach().numpy(), theirs)
    overall = max((float(np.abs(g).max(initial=0)) for g in our_gradients.values()), default=0.0)
    return outputs, [_difference(n, our_gradients[n], their_gradients[n], overall * 1e-3) for n in our_gradients]


def _difference(name: str, ours: NDArray[Any], theirs: NDArray[Any], least: float = 0.0) -> Difference:
    """Rounding explains a thousand units in the last place of the largest value, or of `least`: sums are long."""
    largest = float(np.abs(ours - theirs).max(initial=0))
    scale = float(np.abs(ours).max(initial=0))
    return Difference(name, largest, scale, 1000 * float(np.finfo(ours.dtype).eps) * max(scale, least))


def _first(x: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def _last(x: NDArray[Any]) -> NDArray[Any]:
    return np.moveaxis(x, 1, -1)


def _shape_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) < 2 else (shape[0], shape[-1], *shape[1:-1])
