"""Distinct names for optimizers that were given the same one.

Collectives are matched by name: two optimizers under one name would exchange with each other as soon as the workers
step them in another order, and models of the same shapes would become each other's mean.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from hvd_slowmo.comm.protocol import HANDSHAKE, Comm


class Family:
    """The workers that train together, whichever `Comm` of them: the names of their optimizers differ."""


def family(transport: str, ranks: Sequence[int]) -> Family:
    """Return the one object that stands for these workers in this process."""
    return _families.setdefault((transport, *ranks), Family())


_families: dict[tuple[str | int, ...], Family] = {}

_taken: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()
_kept: dict[int, tuple[object, set[str]]] = {}
_lock = threading.Lock()


def distinct_name(comm: Comm, name: object) -> str:
    """Return `name` for the first optimizer of these workers that is given it, and NAME.1, NAME.2, … for later ones.

    A name is not free again when its optimizer is gone: Python forgets objects at another moment on each worker.

    Args:
        comm: the workers; several objects for the same workers have one `family`.
        name: as given; the default stands for a wrong one until it is refused.

    Example:
        >>> from hvd_slowmo.comm.protocol import SoloComm
        >>> comm = SoloComm()
        >>> [distinct_name(comm, "slowmo") for _ in range(3)]
        ['slowmo', 'slowmo.1', 'slowmo.2']
    """
    given = name if isinstance(name, str) and name else HANDSHAKE
    with _lock:
        taken = _names_of(getattr(comm, "family", comm))
        number, distinct = 0, given
        while distinct in taken:
            number += 1
            distinct = f"{given}.{number}"
        taken.add(distinct)
    return distinct


def forget() -> None:
    """Begin anew, where several trainings follow each other in one process. Every worker does so at the same time."""
    with _lock:
        _taken.clear()
        _kept.clear()


def _names_of(workers: object) -> set[str]:
    try:
        return _taken.setdefault(workers, set())
    except TypeError:  # of a class with __eq__ and no hash, or with __slots__: kept alive, so that its id stays its own
        return _kept.setdefault(id(workers), (workers, set()))[1]
