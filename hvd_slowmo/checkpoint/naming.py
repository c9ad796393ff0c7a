"""Names of a model's tensors in a checkpoint: those of the wire where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hvd_slowmo.wire.parameter_map import Framework, ParameterMap
from hvd_slowmo.wire.tensors import TensorSpec


@dataclass(frozen=True)
class NamedTensors:
    """A model's tensors by their names in a checkpoint.

    Attributes:
        specs: of the tensors.
        naming: "wire" for the names of a ParameterMap, which both frameworks have; otherwise the framework whose own
            names they are.
        reason: in the latter case, the reason why the tensors can't be named as on the wire.
    """

    specs: tuple[TensorSpec, ...]
    naming: str = "wire"
    reason: str = ""


def name_tensors(
    framework: Framework,
    parameter_map: ParameterMap | None,
    on_wire: Callable[[], Iterable[TensorSpec]],
    by_own_names: Callable[[], Iterable[TensorSpec]],
) -> NamedTensors:
    """Return the tensors with the names of the wire or, if they can't have them and no map was given, with their own.

    Args:
        parameter_map: as given by the user.
        on_wire: lists the tensors of the wire, or raises ValueError.
        by_own_names: lists the tensors by the framework's own names.

    Raises:
        ValueError: raised by `on_wire`, with a map.

    Example:
        >>> def refuse():
        ...     raise ValueError("PReLU is not a known layer.")
        >>> name_tensors("keras", None, refuse, list).naming
        'keras'
    """
    try:
        return NamedTensors(tuple(on_wire()))
    except ValueError as error:
        if parameter_map is not None:
            raise
        return NamedTensors(tuple(by_own_names()), framework, str(error))
