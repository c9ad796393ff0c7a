"""What a user names on the command line as "module:name"."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hvd_slowmo.wire.parameter_map import ParameterMap


class Wrong(Exception):
    """What the user gave, and why it can't be used."""


def spell_error(error: Exception) -> str:
    """An error of a library, where its words alone may say little."""
    return f"{type(error).__name__}: {error}"


@contextmanager
def looking_here() -> Iterator[None]:
    """Modules are looked up in the current directory too."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.remove(str(Path.cwd()))


def made(text: str) -> Any:
    """What the function named by "module:function" gives."""
    function = _found(text)
    if not callable(function):
        raise Wrong(f"{text} is not a function.")
    return function()


def given_map(text: str | None) -> ParameterMap | None:
    """The ParameterMap named by "module:name", or what the function of that name gives."""
    from hvd_slowmo.wire.parameter_map import ParameterMap

    if text is None:
        return None
    found = _found(text)
    found = found if isinstance(found, ParameterMap) else found() if callable(found) else found
    if not isinstance(found, ParameterMap):
        raise Wrong(f"{text} is no ParameterMap, and gives none.")
    return found


def _found(text: str) -> Any:
    module, colon, name = text.partition(":")
    if not colon or not module or not name:
        raise Wrong(f"give module:function. Received: {text}")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise Wrong(f"there is no module {error.name} in {Path.cwd()} or among those installed.") from None
    if name not in vars(loaded):
        from hvd_slowmo.wire.parameter_map import nearest

        raise Wrong(f"{module} has no {name}. {nearest(name, [n for n in vars(loaded) if not n.startswith('_')])}")
    return vars(loaded)[name]
