"""Unknown keyword arguments, explained: the nearest known name, other libraries' names, and all known names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches


def refuse_unknown(
    owner: str, received: Iterable[str], known: Collection[str], elsewhere: Mapping[str, str] | None = None
) -> None:
    """Refuse keywords that `owner` does not take.

    Args:
        owner: class or function, for the message.
        received: names of the keywords.
        known: names that it takes.
        elsewhere: for names of other libraries, a sentence that says what takes their place here.

    Raises:
        TypeError: naming the first unknown keyword and its replacement, or the nearest and all known names.

    Example:
        >>> refuse_unknown("SGP", ["overlay"], ["topology", "overlap"])
        Traceback (most recent call last):
        TypeError: SGP has no setting `overlay`. Did you mean `overlap`? It takes: topology, overlap.
    """
    for name in received:
        if name in known:
            continue
        if elsewhere is not None and name in elsewhere:
            raise TypeError(f"{owner} has no setting `{name}`. {elsewhere[name]}")
        near = get_close_matches(name, known, n=1)
        question = f" Did you mean `{near[0]}`?" if near else ""
        raise TypeError(f"{owner} has no setting `{name}`.{question} It takes: {', '.join(known)}.")
