"""Residual networks (He et al., arXiv 1512.03385) in PyTorch: ResNet-18 for small images, and ResNet-50."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution with BatchNorm."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """Two 3 × 3 convolutions, or with `bottleneck` 1 × 1, 3 × 3 and 1 × 1 to four times the width, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        parts = [convolution(width, width, 3, stride), convolution(width, outputs, 1)]
        if bottleneck:
            parts.insert(0, convolution(inputs, width, 1))
        else:
            parts = [convolution(inputs, width, 3, stride), convolution(width, width, 3)]
        nn.init.zeros_(parts[-1][1].weight)  # the block begins as its shortcut (Goyal et al., arXiv 1706.02677)
        self.parts = nn.ModuleList(parts)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for part in self.parts[:-1]:
            y = torch.relu(part(y))
        return torch.relu(self.parts[-1](y) + self.shortcut(x))


def residual(stem: nn.Module, width: int, depths: Sequence[int], classes: int, bottleneck: bool) -> nn.Sequential:
    """Return a network of stages that halve the image and double the width."""
    layers, inputs = [stem], width
    for stage, depth in enumerate(depths):
        for number in range(depth):
            stride = 2 if stage and not number else 1
            layers.append(Block(inputs, width * 2**stage, stride, bottleneck))
            inputs = width * 2**stage * (4 if bottleneck else 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def resnet18(channels: int, classes: int, width: int = 64) -> nn.Sequential:
    """Return ResNet-18 for images of about 32 × 32 pixels: the stem keeps their size."""
    stem = nn.Sequential(convolution(channels, width, 3), nn.ReLU())
    return residual(stem, width, (2, 2, 2, 2), classes, bottleneck=False)


def resnet50(classes: int, width: int = 64) -> nn.Sequential:
    """Return ResNet-50 for images of about 224 × 224 pixels."""
    stem = nn.Sequential(convolution(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return residual(stem, width, (3, 4, 6, 3), classes, bottleneck=True)
