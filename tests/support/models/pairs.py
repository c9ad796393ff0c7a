"""Models in PyTorch and in Keras, in float64."""

import numpy as np
import torch
from torch import nn

# isort: split
# PyTorch comes first: in the other order its libraries may not load.
import keras
from keras import layers as kl

from hvd_slowmo.interop.compare import compare
from hvd_slowmo_tf.interop.layers import entries_keras
from hvd_slowmo_torch.interop.layers import entries_torch


class First(nn.Module):
    """A recurrent or attention layer without the outputs after the first."""

    def __init__(self, layer, times=1):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x):
        return self.layer(*[x] * self.times)[0]


def sequential(shape, *layers, dtype="float64"):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *layers])


def attention(embed, heads, bias=True):
    # Keras rounds 1 / sqrt(embed / heads) to float32, so the tests have 4 there.
    x = keras.Input((5, embed), dtype="float64")
    return keras.Model(x, kl.MultiHeadAttention(heads, embed // heads, use_bias=bias)(x, x))


def lstm(*args, frozen=True, **kwargs):
    layer = nn.LSTM(*args, batch_first=True, **kwargs)
    for name, p in layer.named_parameters():
        if frozen and name.startswith("bias_hh"):
            nn.init.zeros_(p).requires_grad_(False)
    return First(layer)


def gru(*args, **kwargs):
    return First(nn.GRU(*args, batch_first=True, **kwargs))


def batch_norm(layer):
    """Return a BatchNorm layer whose statistics differ from the initial ones."""
    with torch.no_grad():
        for p in (layer.weight, layer.bias, layer.running_mean):
            p.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


class TiedTorch(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.middle(self.embedding(x)))


def tied_keras():
    x = keras.Input((3,), dtype="int64")
    embedding = kl.ReversibleEmbedding(11, 4)
    return keras.Model(x, embedding(kl.Dense(4)(embedding(x)), reverse=True))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4 * 5 * 5, 2)

    def forward(self, x):
        x = self.a(x)
        return self.c(torch.relu(x + self.b(x)).flatten(1))


def residual_keras():
    i = keras.Input((5, 5, 3), dtype="float64")
    x = kl.Conv2D(4, 3, padding="same")(i)
    y = kl.Conv2D(4, 3, padding="same")(x)
    x = kl.Dropout(0.5)(kl.Flatten()(kl.ReLU()(kl.Add()([x, y]))))
    return keras.Model(i, kl.Dense(2)(x))


def nested_keras():
    body = keras.Sequential([keras.Input((5, 5, 3)), kl.Conv2D(4, 2), kl.MaxPooling2D(2)], name="body")
    head = keras.Sequential([keras.Input((16,)), kl.Dense(3, activation="tanh"), kl.Dense(2)], name="head")
    return sequential((5, 5, 3), body, kl.Flatten(), head)


def eps(layer):
    return layer(epsilon=1e-5)


# name: (PyTorch, Keras, shape of Keras' input)
MODELS = {
    "dense": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)),
              lambda: sequential((3,), kl.Dense(4, "tanh"), kl.Dense(2, use_bias=False)), (3,)),
    "einsum": (lambda: nn.Linear(3, 4),
               lambda: sequential((5, 3), kl.EinsumDense("abx,xy->aby", (None, 4), bias_axes="y")), (5, 3)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 2, stride=2), lambda: sequential((7, 3), kl.Conv1D(4, 2, 2)), (7, 3)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (2, 3)), lambda: sequential((5, 6, 3), kl.Conv2D(4, (2, 3))), (5, 6, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3)),
               lambda: sequential((4, 5, 6, 2), kl.Conv3D(3, (1, 2, 3))), (4, 5, 6, 2)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2),
                lambda: sequential((5, 6, 4), kl.Conv2D(6, 3, groups=2)), (5, 6, 4)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3),
                  lambda: sequential((5, 6, 3), kl.DepthwiseConv2D(3, depth_multiplier=2)), (5, 6, 3)),
    "depthwise1d": (lambda: nn.Conv1d(3, 6, 3, groups=3),
                    lambda: sequential((5, 3), kl.DepthwiseConv1D(3, depth_multiplier=2)), (5, 3)),
    "separable": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.Conv2d(6, 4, 1)),
                  lambda: sequential((5, 6, 3), kl.SeparableConv2D(4, 3, depth_multiplier=2)), (5, 6, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2),
                     lambda: sequential((5, 3), kl.Conv1DTranspose(4, 3, 2)), (5, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, (2, 3), stride=2),
                   lambda: sequential((5, 6, 3), kl.Conv2DTranspose(4, (2, 3), 2)), (5, 6, 3)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2),
                     lambda: sequential((3, 4, 5, 2), kl.Conv3DTranspose(3, 2)), (3, 4, 5, 2)),
    "batchnorm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 2), batch_norm(nn.BatchNorm2d(4))),
                  lambda: sequential((5, 6, 3), kl.Conv2D(4, 2), kl.BatchNormalization(epsilon=1e-5)), (5, 6, 3)),
    "layernorm": (lambda: nn.LayerNorm(6), lambda: sequential((5, 6), eps(kl.LayerNormalization)), (5, 6)),
    "groupnorm": (lambda: nn.GroupNorm(2, 6),
                  lambda: sequential((4, 5, 6), kl.GroupNormalization(2, epsilon=1e-5)), (4, 5, 6)),
    "embedding": (lambda: nn.Embedding(7, 3), lambda: sequential((4,), kl.Embedding(7, 3), dtype="int64"), (4,)),
    "lstm": (lambda: lstm(3, 4), lambda: sequential((5, 3), kl.LSTM(4, return_sequences=True)), (5, 3)),
    "lstm stacked": (lambda: lstm(3, 4, num_layers=2, bias=False),
                     lambda: sequential((5, 3), *[kl.LSTM(4, use_bias=False, return_sequences=True) for _ in "ab"]),
                     (5, 3)),
    "gru": (lambda: gru(3, 4), lambda: sequential((5, 3), kl.GRU(4, return_sequences=True)), (5, 3)),
    "gru without bias": (lambda: gru(3, 4, bias=False),
                         lambda: sequential((5, 3), kl.GRU(4, use_bias=False, return_sequences=True)), (5, 3)),
    "bidirectional lstm": (lambda: lstm(3, 4, bidirectional=True),
                           lambda: sequential((5, 3), kl.Bidirectional(kl.LSTM(4, return_sequences=True))), (5, 3)),
    "bidirectional gru": (lambda: gru(3, 4, bidirectional=True, num_layers=2),
                          lambda: sequential((5, 3), *[kl.Bidirectional(kl.GRU(4, return_sequences=True))
                                                       for _ in "ab"]), (5, 3)),
    "attention": (lambda: First(nn.MultiheadAttention(8, 2, batch_first=True), 3), lambda: attention(8, 2), (5, 8)),
    "attention without bias": (lambda: First(nn.MultiheadAttention(12, 3, bias=False, batch_first=True), 3),
                               lambda: attention(12, 3, bias=False), (5, 12)),
    "tied": (TiedTorch, tied_keras, (3,)),
    "flatten": (lambda: nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(80, 5)),
                lambda: sequential((5, 6, 3), kl.Conv2D(4, 2, activation="relu"), kl.Flatten(), kl.Dropout(0.5),
                                   kl.Dense(5)), (5, 6, 3)),
    "flatten1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(16, 5)),
                  lambda: sequential((5, 3), kl.Conv1D(4, 2), kl.Reshape((16,)), kl.Dense(5)), (5, 3)),
    "flatten, batchnorm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), batch_norm(nn.BatchNorm1d(80)),
                                                 nn.Linear(80, 5)),
                           lambda: sequential((5, 6, 3), kl.Conv2D(4, 2), kl.Flatten(),
                                              kl.BatchNormalization(epsilon=1e-5), kl.Dense(5)), (5, 6, 3)),
    "flatten an image": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(90, 5)),
                         lambda: sequential((5, 6, 3), kl.Flatten(), kl.Dense(5)), (5, 6, 3)),
    "flatten a sequence": (lambda: nn.Sequential(lstm(3, 4, bias=False), nn.Flatten(), nn.Linear(20, 5)),
                           lambda: sequential((5, 3), kl.LSTM(4, use_bias=False, return_sequences=True), kl.Flatten(),
                                              kl.Dense(5)), (5, 3)),
    "pooled": (lambda: nn.Sequential(nn.Conv2d(3, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
               lambda: sequential((5, 6, 3), kl.Conv2D(4, 2), kl.GlobalAveragePooling2D(), kl.Dense(5)), (5, 6, 3)),
    "residual": (Residual, residual_keras, (5, 5, 3)),
    "nested": (lambda: nn.Sequential(nn.Conv2d(3, 4, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3), nn.Tanh(),
                                     nn.Linear(3, 2)), nested_keras, (5, 5, 3)),
}  # fmt: skip


def differences(ours, theirs, shape, parameter_map=None, seed=0):
    a, b = entries_torch(ours, parameter_map), entries_keras(theirs, parameter_map)
    rng = np.random.default_rng(seed)
    dtype = theirs.inputs[0].dtype
    x = rng.integers(0, 7, (2, *shape)) if dtype == "int64" else rng.standard_normal((2, *shape))
    return compare(ours, a, theirs, b, [x])
