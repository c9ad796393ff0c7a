"""Calls that come at a wrong time, refused in the same words by every adapter."""

from __future__ import annotations

from collections.abc import Sequence


def refuse_if_left(left: Sequence[int]) -> None:
    """Raise RuntimeError once some workers have left for good.

    Args:
        left: their global ranks.
    """
    if left:
        raise RuntimeError(f"ranks {list(left)} have left in join(leaving=True): nothing can be averaged.")


def refuse_while_averaging(averaging: bool, call: str) -> None:
    """Raise RuntimeError within `averaged_parameters()`.

    Args:
        averaging: it is within.
        call: in the words of the script.
    """
    if averaging:
        raise RuntimeError(f"{call} within averaged_parameters(): the parameters there are not this worker's own.")


def refuse_unmeasured(observes: bool) -> None:
    """Raise RuntimeError if outer steps are not measured."""
    if not observes:
        raise RuntimeError("nothing is measured: construct SlowMo(..., metrics=True)")


def not_started(state_of: str) -> str:
    """Return what is wrong with a call in an elastic job whose workers have not come together.

    Args:
        state_of: argument of the state that brings them together.
    """
    return (
        "this optimizer has not been started: under an elastic launcher the workers come together in the function that "
        f"slowmo.elastic.run decorates, with a slowmo.elastic.State of the {state_of}."
    )
