"""Arguments of the command line: integers, and objects that a user names as "module:name"."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from hvd_slowmo.errors import CommandError, spell_error
from hvd_slowmo.wire.parameter_map import ParameterMap, nearest


def at_least(least: int) -> Callable[[str], int]:
    """Return a type of argparse's: an integer from `least` on.

    Example:
        >>> at_least(1)("3")
        3
    """

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            allowed = "a positive integer" if least == 1 else f"an integer >= {least}"
            raise argparse.ArgumentTypeError(f"must be {allowed}. Received: {text}")
        return value

    parse.__name__ = "integer"  # in argparse's own message
    return parse


@contextmanager
def importing_from_here() -> Iterator[None]:
    """Look modules up in the current directory too, within a `with` block.

    Example:
        >>> with importing_from_here():
        ...     sys.path[0] == str(Path.cwd())
        True
    """
    directory = str(Path.cwd())
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)


def call_named(text: str) -> Any:
    """Return the result of the function named by "module:function".

    Raises:
        CommandError: the text has another form, or its module or function does not exist.

    Example:
        >>> call_named("collections:Counter")
        Counter()
    """
    function = named(text)
    if not callable(function):
        raise CommandError(f"{text} is not a function.")
    return function()


def model_named(text: str, framework: Literal["PyTorch", "Keras"]) -> Any:
    """Return the model that the function named by "module:function" makes.

    Raises:
        CommandError: as `call_named`; or the function fails, or returns no model of this framework.

    Example:
        >>> model_named("collections:Counter", "PyTorch")
        Traceback (most recent call last):
        hvd_slowmo.errors.CommandError: collections:Counter must return a PyTorch model. Received: collections.Counter
    """
    kind_of_model: Any
    if framework == "PyTorch":
        from torch import nn

        kind_of_model = nn.Module
    else:
        import keras

        kind_of_model = keras.Layer
    try:
        model = call_named(text)
    except CommandError:
        raise
    except Exception as error:  # of the user's code: it may raise anything
        raise CommandError(f"{text} has raised {spell_error(error)}") from error
    if not isinstance(model, kind_of_model):
        kind = type(model)
        raise CommandError(f"{text} must return a {framework} model. Received: {kind.__module__}.{kind.__qualname__}")
    return model


@contextmanager
def refusals() -> Iterator[None]:
    """Turn a refusal of the library's, within a `with` block of one documented call, into the command's one line.

    Raises:
        CommandError: for a ValueError or TypeError.

    Example:
        >>> with refusals():
        ...     raise ValueError("`tau` must be positive. Received: 0")
        Traceback (most recent call last):
        hvd_slowmo.errors.CommandError: `tau` must be positive. Received: 0
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def parameter_map_named(text: str | None) -> ParameterMap | None:
    """Return the ParameterMap named by "module:name", or returned by the function of that name; None for None.

    Raises:
        CommandError: as `call_named`; or the object is no ParameterMap and returns none.

    Example:
        >>> parameter_map_named("hvd_slowmo:ParameterMap")
        ParameterMap(pairs={}, orient={}, ignore=())
    """
    if text is None:
        return None
    found = named(text)
    result = found() if callable(found) else found
    if not isinstance(result, ParameterMap):
        raise CommandError(f"{text} is not a ParameterMap, nor a function that returns one.")
    return result


def named(text: str) -> Any:
    """Return the object named by "module:name".

    Raises:
        CommandError: the text has another form, or its module or name does not exist.

    Example:
        >>> named("math:pi")
        3.141592653589793
    """
    module, colon, name = text.partition(":")
    if not colon or not module or not name:
        raise CommandError(f"give module:function. Received: {text}")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise CommandError(f"there is no module {error.name} in {Path.cwd()} or among the installed ones.") from None
    if name not in vars(loaded):
        public = [other for other in vars(loaded) if not other.startswith("_")]
        raise CommandError(f"{module} has no {name}. {nearest(name, public)}")
    return vars(loaded)[name]
