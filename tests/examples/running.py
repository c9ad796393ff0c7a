"""Runs of an example: within a test's process, and as a job of several workers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import progress
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def run(module, monkeypatch, capsys, *arguments):
    """Run an example; return its results without times, and the number of steps that it has taken."""
    monkeypatch.setattr("sys.argv", [module.__file__, *map(str, arguments)])
    capsys.readouterr()
    module.main()
    out, err = capsys.readouterr()
    written = Path(re.search(r"^Written: (.*\.json), .*\.png$", out, re.MULTILINE)[1])
    assert written.with_suffix(".png").read_bytes().startswith(PNG)
    results = json.loads(written.read_text())["runs"]
    shown = re.search(r"^slowmo +(\d+\.\d) ", out, re.MULTILINE)[1]
    assert shown == f"{results[0]['score'][-1]:.1f}"
    for result in results:
        del result["ms_per_step"]
    first = re.search(r"(\d+) of \d+ steps, ", err)
    total = re.search(r"(\d+) of \1 steps in ", err)
    return results, int(total[1]) - int(first[1]) + 1 if first else 0


def run_and_stop(module, monkeypatch, capsys, *arguments, after):
    """Run an example that is interrupted after some steps."""
    taken = 0

    def update(self, steps=1):
        nonlocal taken
        taken += steps
        if taken == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.Progress, "update", update)
        with pytest.raises(KeyboardInterrupt):
            run(module, patch, capsys, *arguments)


def horovodrun(workers, *command):
    """Return the output of a job under horovodrun."""
    launcher = shutil.which("horovodrun", path=Path(sys.executable).parent)
    assert launcher, "horovodrun is not beside this Python"
    return job(launcher, "-np", workers, sys.executable, *command)


def torchrun(workers, *command):
    """Return the output of a job under torchrun."""
    return job(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", workers, *command)


def job(*command):
    """Return the output of a command that ends with status 0."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "torch"), str(ROOT / "tf"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [str(part) for part in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            output, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # not kill: the launcher then ends its workers
            output, _ = process.communicate()
    text = output.decode()
    assert process.returncode == 0, text
    return text
