"""Gossip between outer steps: the two methods and their topologies, as settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray

from hvd_slowmo.checked_numbers import spell_value
from hvd_slowmo.keywords import refuse_unknown

TopologyName = Literal["exponential", "bipartite", "complete", "ring", "full", "star"]
Topology: TypeAlias = TopologyName | NDArray[np.float64] | Sequence[Any] | Callable[[int], Any] | None
"""A name, an array of shape (period, m, m) or (m, m), or a function of m that returns one; None for the default."""

_FUNCTION = "function "  # how a topology that is a function is stored


@dataclass(frozen=True, kw_only=True)
class SGP:
    """Stochastic gradient push (Assran et al., ICML 2019): directed gossip with push-sum weights after every step.

    Args:
        topology: who sends to whom; None for "exponential". With gradients="node" m is the number of nodes.
        overlap: mix each message one step late, so that it travels beside the computation (OSGP).

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of its range.

    Example:
        >>> SGP(topology="ring", overlap=True)
        SGP(topology='ring', overlap=True)
    """

    topology: Topology = None
    overlap: bool = False

    def __new__(cls, *_: Any, **settings: Any) -> SGP:
        """Refuse an unknown setting, and name those that there are."""
        refuse_unknown("SGP", settings, ("topology", "overlap"))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "topology", _checked_topology(self.topology))
        if not isinstance(self.overlap, bool):
            raise TypeError(f"`overlap` must be True or False. Received: overlap={spell_value(self.overlap)}")

    def facts(self) -> dict[str, Any]:
        """Return the settings in JSON types; a topology function by its name only."""
        return _facts("sgp", self)


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """Decentralized parallel SGD (Lian et al., NeurIPS 2017): symmetric gossip after every step.

    Args:
        topology: who exchanges with whom; it must be symmetric and doubly stochastic. None for "bipartite", or "ring"
            where m is odd. With gradients="node" m is the number of nodes.

    Raises:
        TypeError, ValueError: a setting of the wrong type or out of its range.

    Example:
        >>> DPSGD(topology="ring")
        DPSGD(topology='ring')
    """

    topology: Topology = None

    def __new__(cls, *_: Any, **settings: Any) -> DPSGD:
        """Refuse an unknown setting, and overlap, which SGP alone has."""
        late = "Late messages have a weight in SGP only. Use SGP(overlap=True)."
        refuse_unknown("DPSGD", settings, ("topology",), {"overlap": late})
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "topology", _checked_topology(self.topology))

    def facts(self) -> dict[str, Any]:
        """Return the settings in JSON types; a topology function by its name only."""
        return _facts("dpsgd", self)


Gossip: TypeAlias = SGP | DPSGD
METHODS: dict[str, type[SGP] | type[DPSGD]] = {"sgp": SGP, "dpsgd": DPSGD}


def _facts(method: str, gossip: Gossip) -> dict[str, Any]:
    facts = {"method": method, **{f.name: getattr(gossip, f.name) for f in fields(gossip)}}
    if callable(gossip.topology):
        facts["topology"] = f"{_FUNCTION}{getattr(gossip.topology, '__qualname__', type(gossip.topology).__name__)}"
    return facts


def _checked_topology(topology: Any) -> Topology:
    """Refuse an unknown name, and turn an array into nested tuples, which can be compared and stored."""
    if isinstance(topology, str):
        _check_topology_name(topology)
        return cast(TopologyName, topology)
    if topology is None or callable(topology):
        return cast(Topology, topology)
    return _nested_tuples(topology)


def _check_topology_name(name: str) -> None:
    if name.startswith(_FUNCTION):
        raise ValueError(
            f"these settings were stored with a topology that is a {name}, and only its name was. Make the config "
            "anew, with the function itself; in Keras load the model with compile=False and compile it again."
        )
    names = get_args(TopologyName)
    if name not in names:
        raise ValueError(
            f"`topology` must be one of {', '.join(map(repr, names))}, an array (period, m, m), or a function of "
            f"m. Received: topology={name!r}"
        )


def _nested_tuples(array: Any) -> tuple[Any, ...]:
    """Return an array as nested tuples of numbers."""

    def nested(value: Any, depth: int) -> Any:
        if not isinstance(value, (list, tuple)):
            return float(value)
        if depth == 0:
            raise ValueError("more axes than a topology has")
        return tuple(nested(part, depth - 1) for part in value)

    try:
        found = nested(array.tolist() if hasattr(array, "tolist") else array, 3)
    except Exception:  # an object of the user's own may raise anything
        found = None
    if not isinstance(found, tuple):
        raise TypeError(
            "`topology` must be None, a name, an array of numbers or a function of the number of workers. Received: "
            f"topology={spell_value(array)}"
        )
    return found
