"""Scripts of the documentation on two workers; test_docs.py runs them on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), str(ROOT / "torch"), str(ROOT / "tf")]

pytestmark = [pytest.mark.slow, pytest.mark.thorough, pytest.mark.workers]


def block(page, start):
    """Return the first Python block of a page that contains `start`."""
    found = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return next(code for code in found if start in code)


def run(directory, code, *launcher):
    """Run a script in a directory, and return its output."""
    (directory / "script.py").write_text(code, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HOROVOD_")}
    environment |= {"PYTHONPATH": os.pathsep.join(PATHS), "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *launcher, "script.py"],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_whole_script_resumes_by_the_same_command(tmp_path):
    code = block("get-started.md", "EPOCHS = 3")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    first = run(tmp_path, code.replace("EPOCHS = 3", "EPOCHS = 2"), *torchrun)
    assert re.findall(r"epoch (\d)", first) == ["1", "2"]
    assert re.findall(r"epoch (\d)", run(tmp_path, code, *torchrun)) == ["3"]
    assert (tmp_path / "circle.pt").exists()


def test_the_whole_keras_script_resumes_by_the_same_command(tmp_path):
    code = block("get-started.md", "network.fit")
    launcher = ("-m", "hvd_slowmo.cli.main", "run", "-np", "2", sys.executable)
    first = run(tmp_path, code.replace("epochs=3", "epochs=2"), *launcher)
    assert re.findall(r"Epoch (\d)/", first) == ["1", "2"]
    assert re.findall(r"Epoch (\d)/", run(tmp_path, code, *launcher)) == ["3"]
    assert (tmp_path / "circle.keras").exists()


def test_the_function_of_a_notebook_gives_equal_models(tmp_path):
    code = block("running.md", "def train(steps, lr)")
    call = "".join(f"    {line}\n" for line in block("running.md", "horovod.run(").splitlines())
    check = "    print(sorted(first), all((first[name] == second[name]).all() for name in first))\n"
    output = run(tmp_path, f'{code}\n\nif __name__ == "__main__":\n{call}{check}')
    assert "['bias', 'weight'] True" in output
