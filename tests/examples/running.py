"""Runs of an example within a test's process."""

import json
import re
from pathlib import Path

import progress
import pytest

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
