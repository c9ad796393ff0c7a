"""A script's own state in a checkpoint: JSON types and a few more, without pickle, as an array of bytes."""

from __future__ import annotations

import base64
import json
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TUPLE, _DICT, _COUNTER, _ARRAY, _BYTES = "__tuple__", "__dict__", "__counter__", "__array__", "__bytes__"
_TAGS = {_TUPLE, _DICT, _COUNTER, _ARRAY, _BYTES}


def dump(name: str, value: Any) -> NDArray[np.uint8]:
    """Return a value as bytes; `load` returns an equal one.

    Args:
        name: of the value, for the message.
        value: numbers, strings, None, bytes, NumPy arrays, and lists, tuples, dicts and Counters of these.

    Raises:
        TypeError: a part of the value has another type.

    Example:
        >>> load(dump("milestones", {30: (1, 0.5)}))
        {30: (1, 0.5)}
        >>> dump("state", {"hook": print})
        Traceback (most recent call last):
        TypeError: state['hook'] can't be saved without pickle. Received: builtin_function_or_method...
    """
    text = json.dumps(_encoded(name, value), separators=(",", ":"))
    return np.frombuffer(text.encode(), np.uint8)


def load(array: NDArray[np.uint8]) -> Any:
    """Return the value that `dump` was given."""
    return _decoded(json.loads(array.tobytes()))


def _encoded(place: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        data = base64.b64encode(np.asarray(value, order="C").tobytes()).decode()
        return {_ARRAY: [value.dtype.str, list(value.shape), data]}
    if isinstance(value, list):
        return [_encoded(f"{place}[{number}]", each) for number, each in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: _encoded(place, list(value))}
    if isinstance(value, dict):
        if not isinstance(value, Counter) and all(isinstance(key, str) and key not in _TAGS for key in value):
            return {key: _encoded(f"{place}[{key!r}]", each) for key, each in value.items()}
        tag = _COUNTER if isinstance(value, Counter) else _DICT
        return {tag: [[_encoded(place, key), _encoded(f"{place}[{key!r}]", each)] for key, each in value.items()]}
    raise TypeError(
        f"{place} can't be saved without pickle. Received: {type(value).__name__}. Give numbers, strings, lists, "
        "tuples, dicts and NumPy arrays; a tensor as tensor.numpy()."
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), None)
    if tag == _BYTES:
        return base64.b64decode(value[_BYTES])
    if tag == _ARRAY:
        dtype, shape, data = value[_ARRAY]
        return np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
    if tag == _TUPLE:
        return tuple(_decoded(value[_TUPLE]))
    if tag in (_DICT, _COUNTER):
        pairs = {_decoded(key): _decoded(each) for key, each in value[tag]}
        return Counter(pairs) if tag == _COUNTER else pairs
    return {key: _decoded(each) for key, each in value.items()}
