"""The core needs no framework, and no directory of this repository shadows one."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_core_imports_where_there_is_no_framework():
    code = """
        import importlib, pkgutil, sys

        BLOCKED = {"torch", "tensorflow", "keras", "horovod"}

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in BLOCKED:
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Absent())
        import hvd_slowmo

        DOORS = {"hvd_slowmo.torch", "hvd_slowmo.tf"}
        SCRIPTS = {"hvd_slowmo.installer.worker"}
        for module in pkgutil.walk_packages(hvd_slowmo.__path__, "hvd_slowmo."):
            if module.name not in DOORS | SCRIPTS:
                importlib.import_module(module.name)
        assert not BLOCKED & set(sys.modules)
    """
    result = _run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_torch_at_the_root_of_the_checkout_is_pytorch():
    result = _run("import torch; torch.optim.SGD; print(torch.__file__)")
    assert result.returncode == 0, result.stderr
    assert not Path(result.stdout.strip()).is_relative_to(ROOT / "torch")


def test_the_adapters_folders_carry_no_init():
    assert not (ROOT / "torch" / "__init__.py").exists()
    assert not (ROOT / "tf" / "__init__.py").exists()
