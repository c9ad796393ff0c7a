"""The handshake: before anything is exchanged, the workers compare their settings and models.

A difference that would train the wrong thing raises on every worker, naming the rank and the first difference; a merely
unusual one (another framework version) warns.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.errors import SharedError, raise_together, share

T = TypeVar("T")

logger = logging.getLogger("hvd_slowmo")

RESTART_FACT = "number of steps at restart()"

WIRE = 10
"""Version of names, order and layout of the collectives. Workers of different versions refuse each other."""


def agree(comm: ScopedComm, facts: Mapping[str, Any], remarks: Mapping[str, Any], error: Exception | None) -> None:
    """Compare every worker's facts with rank 0's. A collective.

    Args:
        facts: must be equal; compared in their order; JSON types.
        remarks: may differ, with a warning.
        error: of this worker, if there has been one already; it takes part all the same, so that the others hear of it.

    Raises:
        Exception: on every worker of one type, if one of them has an error; the text names its rank.
        ValueError: on every worker, if a fact differs.
    """
    facts = {"wire version of hvd-slowmo": WIRE, **facts}
    own = json.dumps([facts, remarks, None if error is None else share(error)], default=str)
    digests = comm.gather("digest", hashlib.sha256(own.encode()).hexdigest() + ("" if error is None else "!"))
    if len(set(digests)) == 1 and error is None:
        return
    # Only now the long form travels: all workers see the same digests, so all of them come here.
    everyone = [json.loads(text) for text in comm.gather("facts", own)]
    failed = [(rank, SharedError(*each[2])) for rank, each in zip(comm.ranks, everyone, strict=True) if each[2]]
    raise_together(comm.name, failed, comm.size, error)
    first = everyone[0]
    for rank, each in zip(comm.ranks, everyone, strict=True):
        for key, expected in first[0].items():
            difference = _difference(key, expected, each[0].get(key))
            if difference is not None:
                raise ValueError(
                    f"{comm.name}: rank {rank} differs from rank {comm.ranks[0]}: {difference}. "
                    "All workers must be given the same settings and the same model."
                )
    seen: dict[str, tuple[int, Any]] = {}  # the first worker that has one: frameworks have remarks of their own
    for rank, each in zip(comm.ranks, everyone, strict=True):
        for key, value in each[1].items():
            other, expected = seen.setdefault(key, (rank, value))
            if value != expected and comm.rank == 0:
                logger.warning(
                    "%s: %s differs: rank %s has %s, rank %s has %s", comm.name, key, rank, value, other, expected
                )


def agreed(comm: ScopedComm, make: Callable[[], tuple[T, Mapping[str, Any]]], remarks: Mapping[str, Any]) -> T:
    """Return the first half of `make()`, once all workers have compared the second half, its facts. A collective.

    Raises:
        Exception: `make` has raised on a worker; of one type on every worker, see `hvd_slowmo.errors.raise_together`.
        ValueError: on every worker, if a fact differs.
    """
    made: T | None = None
    facts: Mapping[str, Any] = {}
    error: Exception | None = None
    try:
        made, facts = make()
    except Exception as caught:  # whatever it is, the other workers wait in agree() and must hear of it
        error = caught
    agree(comm, facts, remarks, error)
    assert made is not None, "agree() raises where it is missing"
    return made


def _difference(key: str, expected: Any, received: Any) -> str | None:
    """Return the first difference between two facts in words, None if there is none."""
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
