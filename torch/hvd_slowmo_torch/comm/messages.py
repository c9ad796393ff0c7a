"""Messages of a push."""

from __future__ import annotations

from typing import Any

import torch


def shared(x: torch.Tensor, weights: Any) -> torch.Tensor:
    """Return the messages weight * x for the weights that are not 0, one behind the other.

    Example:
        >>> shared(torch.ones(2), [0.5, 0.0, 2.0])
        tensor([0.5000, 0.5000, 2.0000, 2.0000])
    """
    messages = [x * float(weight) for weight in weights if weight]
    return torch.cat(messages) if len(messages) > 1 else messages[0] if messages else x[:0]
