"""Parts of a test that belong to `make test`, where thorough tests are left out; `make test-all` runs all of it.

@pytest.mark.sample("SGD", "Adam")    of many variants, these ids
@pytest.mark.sample(every=3)          the first and each third one from there
@examples(80)                         of generated examples, a quarter
for name, problem in some(PROBLEMS)   of problems that one test goes through, each third one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import hypothesis
import pytest

Value = TypeVar("Value")

_all = True


def begin(config: pytest.Config) -> None:
    """Note whether this run leaves thorough tests out, before it imports test files."""
    global _all  # read by decorators of the test files
    _all = "not thorough" not in config.option.markexpr


def of_all(number: int, few: int) -> int:
    """Return `number` where this run is a thorough one, else `few`."""
    return number if _all else few


def leave_out(items: Sequence[pytest.Item]) -> None:
    """Mark the other variants as thorough.

    Raises:
        pytest.UsageError: a test has no variant of an id that its mark names, while several are there.
    """
    variants: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sample"):
            variants.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, found in variants.items():
        mark = found[0].get_closest_marker("sample")
        assert mark is not None, "as above"
        ids = [item.name.partition("[")[2].removesuffix("]") for item in found]
        unknown = set(mark.args).difference(ids)
        if unknown and len(found) > 1:  # one variant may have been asked for on the command line
            raise pytest.UsageError(f"{name} has no variants {sorted(unknown)}. It has {ids}")
        every = mark.kwargs.get("every")
        for number, (item, variant) in enumerate(zip(found, ids, strict=True)):
            if number % every if every else variant not in mark.args:
                item.add_marker(pytest.mark.thorough)


def examples(number: int) -> hypothesis.settings:
    """Return the settings of a test with `number` generated examples, which are the same in each run."""
    return hypothesis.settings(max_examples=of_all(number, -(-number // 4)), deadline=None, derandomize=True)


def some(problems: Mapping[str, Value]) -> list[tuple[str, Value]]:
    """Return the names and problems that belong to this run."""
    return list(problems.items())[:: of_all(1, 3)]
