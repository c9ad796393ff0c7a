"""The installer for real: a new environment with PyTorch alone, and the doctor in the one that runs the tests."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_slowmo.installer import check, recipe

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.workers]


def _run(*command, cwd, timeout=900):
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # Two workers share this machine with whatever else runs.
    env["OMP_NUM_THREADS"] = "1"
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{output[-6000:]}"
    return output


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory):
    """A new environment with PyTorch, this package and Horovod, and without TensorFlow.

    The wheel of Horovod comes from the user's cache, where it is built when this runs for the first time.
    """
    folder = tmp_path_factory.mktemp("torch-alone")
    # A copy: building a package leaves files beside setup.py.
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("hvd_slowmo", "torch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    _run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "numpy", "setuptools")]
    pip = (python, "-m", "pip", "install", "--quiet")
    _run(*pip, *_cpu_index(), *wanted, cwd=folder)
    _run(*pip, "--no-build-isolation", f"{source}[torch]", cwd=folder)
    return folder


def _cpu_index():
    code = "import setup_venv; print(setup_venv.CPU_INDEX if setup_venv.cpu_index_answers() else '')"
    index = _run(sys.executable, "-c", code, cwd=ROOT / "tools").strip()
    return ("--extra-index-url", index) if index else ()


def test_pytorch_alone_from_nothing_to_training(torch_alone):
    binaries = torch_alone / "venv" / "bin"
    said = _run(binaries / "hvd-slowmo", "install-horovod", cwd=torch_alone)
    assert "Two workers summed a tensor with PyTorch" in said
    assert "TensorFlow" not in said
    said = _run(binaries / "hvd-slowmo", "install-horovod", cwd=torch_alone)
    assert "is installed already" in said

    said = _run(binaries / "hvd-slowmo", "doctor", cwd=torch_alone)
    assert "Training works here" in said
    assert "warning" not in said
    assert "problem" not in said

    example = ROOT / "examples" / "minimal_torch.py"
    _run(binaries / "horovodrun", "-np", "2", binaries / "python", example, cwd=torch_alone, timeout=300)

    site = next((torch_alone / "venv" / "lib").glob("python*/site-packages"))
    assert (site / "hvd_slowmo_torch" / "__init__.py").exists()
    assert not (site / "torch" / "hvd_slowmo_torch").exists()  # no file of ours inside PyTorch
    _run(binaries / "python", "-m", "pip", "check", cwd=torch_alone)
    _run(binaries / "python", "-m", "pip", "uninstall", "--yes", "horovod", cwd=torch_alone)
    assert not (site / "horovod").exists()


def test_the_doctor_is_content_with_the_development_environment():
    said = _run(sys.executable, "-m", "hvd_slowmo.cli", "doctor", cwd=ROOT)
    assert "Training works here" in said
    assert "Two workers summed a tensor with PyTorch" in said
    assert "Two workers summed a tensor with TensorFlow" in said


def test_the_stall_check_of_our_build_reports_a_tensor_that_never_comes():
    built = recipe.installed()
    assert built is not None, "this environment's Horovod was not built by `hvd-slowmo install-horovod`: run make setup"
    assert built.stall_check_mended
    assert check.stall("torch").error is None


def test_a_check_that_fails_says_what_the_workers_said():
    result = check.allreduce("torch", time_limit=0.2)
    assert result.error is not None
    assert result.error.startswith("no result within 0.2 s")
    assert result.seconds < 30
