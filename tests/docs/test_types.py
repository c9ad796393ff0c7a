"""The types of the public interface, as users see them."""

import importlib
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from hvd_slowmo import SlowMoConfig
from hvd_slowmo.presets import Presets

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "support" / "typed_user.py"


@pytest.mark.slow
@pytest.mark.thorough
def test_a_typed_script_passes_mypy_strict(tmp_path):
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path, SCRIPT]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout


def test_the_typed_script_runs():
    from support.typed_user import train

    assert train() == 1.0


@pytest.mark.parametrize("module", ["hvd_slowmo", "hvd_slowmo.torch", "hvd_slowmo.tf"])
def test_type_hints_can_be_read_at_run_time(module):
    """Tools that build command lines and configurations from signatures do so, such as jsonargparse and typer."""
    public = importlib.import_module(module)
    read = 0
    for name in public.__all__:
        found = getattr(public, name)
        members = vars(found).values() if inspect.isclass(found) else ()
        presets = [getattr(SlowMoConfig, preset) for preset in dir(Presets) if not preset.startswith("_")]
        for function in [found, *members, *presets]:
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function) and function.__module__.startswith("hvd_slowmo"):
                typing.get_type_hints(function)
                read += 1
    assert read > 20
