"""Names of the collectives within a step: the same at every step, and preceded by the optimizer's name."""

from __future__ import annotations

from hvd_slowmo.core.parts.layout import Layout

PRESENT = "present"  # who trains, at what rates, and who has a gradient for which parameter


def ledger(fragment: int = 0) -> str:
    """Return the name of the ledger; late meetings about several fragments may be in flight at a time."""
    return f"ledger.{fragment}" if fragment else "ledger"


def model(chunk: int) -> str:
    """Return the name of the sum of a chunk of the model."""
    return f"model.{chunk}"


def values(chunk: int) -> str:
    """Return the name of a chunk that is summed apart from a meeting, beside which a late one may be under way."""
    return f"values.{chunk}"


def mean(chunk: int) -> str:
    """Return the name of the exchange of a chunk's mean, or step, where workers take it slice by slice."""
    return f"mean.{chunk}"


def gradient(chunk: int) -> str:
    """Return the name of the sum of a chunk of gradients."""
    return f"gradient.{chunk}"


def push(chunk: int) -> str:
    """Return the name of the gossip message of a chunk."""
    return f"push.{chunk}"


def within_step(layout: Layout) -> list[str]:
    """Return every name that a step can use."""
    parameters = [chunk.index for chunk in layout.parameter_chunks]
    return [
        *(ledger(fragment) for fragment in range(layout.fragments)),
        PRESENT,
        *(name(chunk.index) for name in (model, mean, values) for chunk in layout.chunks),
        *(name(index) for name in (gradient, push) for index in parameters),
    ]
