"""The examples in the docstrings of the examples run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["epochs", "metrics_table", "parallel_text", "progress", "schedules"])
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0
    assert tried > 0
