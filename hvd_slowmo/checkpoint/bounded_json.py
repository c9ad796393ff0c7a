"""JSON of unknown origin: its length and depth are limited before it is decoded."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_LENGTH = 32 * 2**20
"""Characters, enough for the facts of 100,000 arrays."""

MAX_DEPTH = 32
"""Arrays and objects within each other; facts have less than ten. Python's parser ends at about a thousand."""

# A string runs to its end or, unfinished, to the text's, so that the scan takes linear time.
_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)


def decode(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is no JSON, too long, or too deep.

    Example:
        >>> decode('{"a": [1]}')
        {'a': [1]}
        >>> decode("[" * 100_000)
        Traceback (most recent call last):
        ValueError: its JSON has more than 32 arrays and objects within each other
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"its JSON has {len(text)} characters, more than {MAX_LENGTH}")
    depth = 0
    for token in _TOKENS.finditer(text):
        first = token.group()[0]
        if first != '"':
            depth += 1 if first in "[{" else -1
            if depth > MAX_DEPTH:
                raise ValueError(f"its JSON has more than {MAX_DEPTH} arrays and objects within each other")
    return json.loads(text)
