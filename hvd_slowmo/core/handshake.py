"""Before anything is exchanged: do the workers mean the same?

A difference that would train the wrong thing raises on every worker, naming the rank and the first thing that differs;
one that is only unusual (another framework version) warns.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hvd_slowmo.comm.protocol import Comm

T = TypeVar("T")

logger = logging.getLogger("hvd_slowmo")

WIRE = 2
"""Version of names, order and layout of the collectives. Workers of different versions refuse each other."""


def agree(comm: Comm, name: str, facts: Mapping[str, Any], remarks: Mapping[str, Any], error: str | None) -> None:
    """Compare every worker's facts with rank 0's. A collective.

    Args:
        facts: what must be equal, in the order in which it is compared; JSON types.
        remarks: what may differ with a warning.
        error: what already went wrong on this worker; it takes part all the same, so that the others hear of it.

    Raises:
        ValueError: on every worker, if one of them has an error or a fact differs.
    """
    facts = {"wire version of hvd-slowmo": WIRE, **facts}
    mine = json.dumps([facts, remarks, error], default=str)
    digests = comm.gather(f"{name}.digest", hashlib.sha256(mine.encode()).hexdigest() + ("" if error is None else "!"))
    if len(set(digests)) == 1 and error is None:
        return
    # Only now the long form travels: all workers see the same digests, so all of them come here.
    everyone = [json.loads(text) for text in comm.gather(f"{name}.facts", mine)]
    failed = [f"rank {r}: {each[2]}" for r, each in zip(comm.ranks, everyone, strict=True) if each[2] is not None]
    if failed:
        raise ValueError(error if error is not None and len(failed) == 1 else f"{name}: {'; '.join(failed)}")
    first = everyone[0]
    for rank, each in zip(comm.ranks, everyone, strict=True):
        for key, expected in first[0].items():
            difference = _difference(key, expected, each[0].get(key))
            if difference is not None:
                raise ValueError(
                    f"{name}: rank {rank} differs from rank {comm.ranks[0]}: {difference}. "
                    "All workers must be given the same settings and the same model."
                )
    known: dict[str, tuple[int, Any]] = {}  # the first worker that has one: frameworks have remarks of their own
    for rank, each in zip(comm.ranks, everyone, strict=True):
        for key, value in each[1].items():
            other, expected = known.setdefault(key, (rank, value))
            if value != expected and comm.rank == 0:
                logger.warning(
                    "%s: %s differs: rank %s has %s, rank %s has %s", name, key, rank, value, other, expected
                )


def agreed(comm: Comm, name: str, make: Callable[[], tuple[T, Mapping[str, Any]]], remarks: Mapping[str, Any]) -> T:
    """What `make` gives beside its facts, once all workers have compared these. A collective.

    Raises:
        Exception: what `make` raised here.
        ValueError: what it raised on another worker, or a fact differs.
    """
    made: T | None = None
    facts: Mapping[str, Any] = {}
    error: Exception | None = None
    try:
        made, facts = make()
    except Exception as caught:  # whatever it is, the other workers wait in agree() and must hear of it
        error = caught
    try:
        agree(comm, name, facts, remarks, None if error is None else str(error))
    except ValueError as raised:
        raise (raised if error is None else error) from None
    assert made is not None, "agree() raises where it is missing"
    return made


def _difference(key: str, expected: Any, received: Any) -> str | None:
    """The first difference within two facts, in words: (what) there is `received` instead of `expected`."""
    if expected == received:
        return None
    if isinstance(expected, dict) and isinstance(received, dict):
        for part, value in expected.items():
            found = _difference(f"{key}: {part}", value, received.get(part))
            if found is not None:
                return found
    if isinstance(expected, list) and isinstance(received, list) and expected and isinstance(expected[0], list):
        for number, (a, b) in enumerate(zip(expected, received, strict=False)):
            if a != b:
                return f"{key}, entry {number}: it has {_spell(b)} where {_spell(a)} is expected"
        return f"{key}: it has {len(received)} entries where {len(expected)} are expected"
    return f"{key}: it has {_spell(received)} where {_spell(expected)} is expected"


def _spell(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else repr(value)
