"""The figure of an outer step in Horovod's timeline, from real workers."""

import re

import pytest

from support.installation import ROOT, python_here, run


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.workers
def test_an_outer_step_is_drawn_blocking_and_streamed(tmp_path):
    figure = tmp_path / "timeline.png"
    script = ROOT / "benchmarks" / "outer_step_timeline.py"
    said = run(python_here, script, "--batch-size", "8", "--blocks", "3", "--out", figure, cwd=tmp_path)
    assert re.search(r"blocking: \d+ ms, the fastest of 1 blocks\nstreamed .*: \d+ ms, .*\nwritten: ", said), said
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")
