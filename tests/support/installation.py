"""Frameworks, a reporter and commands in subprocesses, for the tests of the installation."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from hvd_slowmo.installer.frameworks import Framework

ROOT = Path(__file__).resolve().parents[2]
python_here = sys.executable
TORCH = Framework("torch", "2.13.0+cpu", cuda=False)
TENSORFLOW = Framework("tensorflow", "2.21.0", cuda=False)


class Recorder:
    """Reporter that records its messages."""

    def __init__(self):
        self.said = []
        self.percents = []
        self.notes = []

    def say(self, text):
        self.said.append(text)

    def detail(self, line):
        pass

    def progress(self, what, percent, seconds, note=""):
        self.percents.append(percent)
        self.notes.append(note)

    def finish_progress(self):
        pass


def run(*command, cwd, timeout=900):
    """Run a command, which must succeed; return its output."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # Two workers share this machine with other processes.
    env |= {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{output[-6000:]}"
    return output


def run_code(code, **env):
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
