"""The types of the public interface, as users see them."""

import subprocess
import sys
from pathlib import Path

import pytest

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
