"""The examples in docstrings run, and the public interface has them."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import hvd_slowmo
import hvd_slowmo_tf
import hvd_slowmo_torch

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


WITHOUT = ("hvd_slowmo.installer", "hvd_slowmo.cli.")  # commands, covered by the tests in cli/ and installer/


def modules():
    packages = (hvd_slowmo, hvd_slowmo_torch, hvd_slowmo_tf)
    names = [m.name for p in packages for m in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")]
    return [name for name in names if not name.startswith(WITHOUT)]


@pytest.mark.slow
@pytest.mark.parametrize("name", modules())
def test_examples_run(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=FLAGS)
    assert failed == 0


@pytest.mark.parametrize("door", ["hvd_slowmo.torch", "hvd_slowmo.tf"])
def test_public_classes_have_an_example(door):
    module = importlib.import_module(door)
    for name in module.__all__:
        item = getattr(module, name)
        if inspect.isclass(item):
            assert ">>> " in (inspect.getdoc(item) or ""), name
