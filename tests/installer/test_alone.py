"""Install and train with one framework alone, in a new environment: `make test-install`.

The tests take about ten minutes: each environment downloads its framework and, unless the user's cache has the wheel,
builds Horovod.
"""

import importlib.metadata
import shutil
import urllib.request

import pytest

from support.installation import ROOT, python_here, run

pytestmark = [pytest.mark.slow, pytest.mark.workers, pytest.mark.install]

# The framework and the requirements of the examples.
PACKAGES = {
    "torch": ("torch", "msgspec", "numpy", "safetensors", "setuptools", "scikit-learn", "matplotlib", "tqdm"),
    "tf": (
        "tensorflow-cpu",
        "keras",
        "msgspec",
        "numpy",
        "safetensors",
        "setuptools",
        "scikit-learn",
        "matplotlib",
        "tqdm",
    ),
}
NAMES = {"torch": "PyTorch", "tf": "TensorFlow"}
JOBS = {"torch": "digits_torch.py", "tf": "digits_keras.py"}


def cpu_index():
    index = "https://download.pytorch.org/whl/cpu"
    try:
        with urllib.request.urlopen(f"{index}/torch/", timeout=4):
            return ("--extra-index-url", index)
    except OSError:
        return ()


@pytest.mark.parametrize("framework", PACKAGES)
def test_one_framework_alone_from_nothing_to_training(framework, tmp_path):
    # Copy the sources: building a package leaves files next to setup.py.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("hvd_slowmo", "torch", "tf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(python_here, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    binaries = tmp_path / "venv" / "bin"
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES[framework]]
    pip = (binaries / "python", "-m", "pip", "install", "--quiet")
    run(*pip, *(cpu_index() if framework == "torch" else ()), *wanted, cwd=tmp_path)
    # tensorflow-cpu is TensorFlow under another name: the extra would download tensorflow too.
    extra = "[torch]" if framework == "torch" else ""
    run(*pip, "--no-build-isolation", f"{source}{extra}", cwd=tmp_path)

    (other,) = set(NAMES) - {framework}
    said = run(binaries / "hvd-slowmo", "install-horovod", cwd=tmp_path)
    assert f"Two workers summed a tensor with {NAMES[framework]}" in said
    assert NAMES[other] not in said
    said = run(binaries / "hvd-slowmo", "install-horovod", cwd=tmp_path)
    assert "is installed already" in said

    said = run(binaries / "hvd-slowmo", "doctor", cwd=tmp_path)
    assert "Training works here" in said
    assert "warning" not in said
    assert "problem" not in said

    example = ROOT / "examples" / JOBS[framework]
    run(
        binaries / "horovodrun", "-np", "2", binaries / "python", example, "--quick", cwd=tmp_path, timeout=300
    )  # fmt: skip
    assert list((tmp_path / "results").glob("*.png"))

    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    assert (site / f"hvd_slowmo_{framework}" / "__init__.py").exists()
    assert not (site / "torch" / "hvd_slowmo_torch").exists()  # PyTorch's directory has no file of this project
    run(binaries / "python", "-m", "pip", "check", cwd=tmp_path)
    run(binaries / "python", "-m", "pip", "uninstall", "--yes", "horovod", cwd=tmp_path)
    assert not (site / "horovod").exists()
