"""The types of the public interface, from a user's side."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_a_typed_script_passes_mypy_strict(tmp_path):
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path, HERE / "typed_user.py"]
    result = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout


def test_the_typed_script_runs():
    from typed_user import train

    assert train() == 1.0
