"""The function that `horovod.run` starts: every worker returns the model of a script under torchrun, bitwise."""

from __future__ import annotations

import sys

import pytest
from running import EXAMPLES, job, torchrun


def reports(output: str) -> list[str]:
    """Return each worker's line, by rank."""
    return sorted(line for line in output.splitlines() if " of 2: test accuracy" in line)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.workers
def test_horovod_run_trains_as_a_script_does() -> None:
    script = EXAMPLES / "launch_function.py"
    found = reports(job(sys.executable, script, "--with", "horovod", "--steps", 60))
    assert len(found) == 2
    assert found == reports(torchrun(2, script, "--steps", 60))
