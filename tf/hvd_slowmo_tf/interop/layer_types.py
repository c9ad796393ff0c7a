"""Keras' layers by their effect on the order of features, and the layers within a layer."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers
from keras.src.models import Functional  # not public: the class of keras.Model(inputs, outputs)


def _named(*names: str) -> tuple[Any, ...]:
    """Return classes of keras.layers; those that this version of Keras lacks are left out."""
    return tuple(getattr(layers, name) for name in names if hasattr(layers, name))


_DIMENSIONS = ("1D", "2D", "3D")
_POOLINGS = ("Max", "Average", "AdaptiveMax", "AdaptiveAverage")

CONVOLUTIONS = _named(*(f"Conv{d}" for d in _DIMENSIONS))
TRANSPOSED = _named(*(f"Conv{d}Transpose" for d in _DIMENSIONS))
DEPTHWISE = _named("DepthwiseConv1D", "DepthwiseConv2D")
SEPARABLE = _named("SeparableConv1D", "SeparableConv2D")

# They take and give feature maps, and have a data_format.
SPATIAL = (
    *CONVOLUTIONS,
    *TRANSPOSED,
    *DEPTHWISE,
    *SEPARABLE,
    *_named(*(f"{kind}Pooling{d}" for kind in _POOLINGS for d in _DIMENSIONS)),
    *_named("UpSampling2D", "UpSampling3D", "ZeroPadding2D", "ZeroPadding3D", "Cropping2D", "Cropping3D"),
)

# They take and give sequences, which both frameworks keep alike, or vectors.
OF_SEQUENCES = _named("Embedding", "LSTM", "GRU", "SimpleRNN", "RNN", "Bidirectional", "MultiHeadAttention")

ELEMENTWISE = _named(
    "Activation", "ReLU", "LeakyReLU", "ELU", "Softmax", "Identity", "Rescaling", "Masking", "BatchNormalization",
    "LayerNormalization", "GroupNormalization", "RMSNormalization", "UnitNormalization", "Dropout", "AlphaDropout",
    "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianNoise", "GaussianDropout",
    "ActivityRegularization", "Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum",
)  # fmt: skip

# The operations of keras.ops that a functional model may have in place of layers.
ELEMENTWISE_OPERATIONS = frozenset(
    ("Absolute", "Add", "Divide", "Elu", "Exp", "Gelu", "HardSwish", "LeakyRelu", "Maximum", "Minimum", "Multiply",
     "Negative", "Relu", "Relu6", "Selu", "Sigmoid", "Silu", "Softplus", "Sqrt", "Square", "Subtract", "Tanh")
)  # fmt: skip


def graph(model: Any) -> Any:
    """Return the functional model that has a model's graph, or None if it has none."""
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if type(model).call is Functional.call else None


def children(layer: Any) -> list[Any]:
    """Return the layers within a layer or model, in its order."""
    if isinstance(layer, keras.Model):
        return list(layer.layers)
    return list(layer._flatten_layers(include_self=False, recursive=False))
