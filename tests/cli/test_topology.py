"""`hvd-slowmo topology`."""

from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from hvd_slowmo.cli import main as cli
from hvd_slowmo.topology.analysis import moves_weights, spectral_gap
from hvd_slowmo.topology.checks import topology
from hvd_slowmo.topology.graphs import NAMED
from support.graphs import CASES


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert cli.main(["topology", *arguments]) == status
    out, err = capsys.readouterr()
    assert (err if status == 0 else out) == ""
    return out if status == 0 else err


@pytest.mark.parametrize(("name", "m"), [case for case in CASES if case[1] in (1, 2, 5, 12)])
def test_command_shows_every_topology(capsys: pytest.CaptureFixture[str], name: str, m: int) -> None:
    out = shown(capsys, name, "-m", str(m))
    assert out.startswith(f"{name}, {m} worker")
    assert out.count("\nstep ") == len(topology(name, m))
    assert f"spectral gap over the period   {spectral_gap(topology(name, m)):.4g}\n" in out
    assert ("w              moves" in out) == moves_weights(topology(name, m))


def test_command_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "exponential", "-m", "8") == (
        "exponential, 8 workers, period 3\n"
        "step 0\n  all keep 1/2, send 1/2 to +1\n"
        "step 1\n  all keep 1/2, send 1/2 to +2\n"
        "step 2\n  all keep 1/2, send 1/2 to +4\n"
        "spectral gap over the period   1\n"
        "steps to consensus             3, exactly the mean\n"
        "messages per worker and step   1\n"
        "push-sum weight w              stays 1; with overlap between 0.5 and 0.75\n"
    )
    assert "  1, 3, ..., 11 keep 1/2, send 1/2 to -5\n" in shown(capsys, "bipartite", "-m", "12")
    out = shown(capsys, "star", "-m", "5")
    assert "  0 keep all\n  1-4 keep 1/2, send 1/2 to 0\n" in out
    assert "  0 keep 1/5, send 1/5 to each other\n  1-4 keep all\n" in out
    assert "messages per worker and step   0.8 on average, 0 to 4" in out
    out = shown(capsys, "ring", "-m", "12", "--node-size", "3")
    assert out.startswith("ring, 4 nodes of 3 workers, period 1\nstep 0\n  all keep 1/3, send 1/3 to +3, -3\n")
    assert "to consensus             7 to a thousandth" in out


def test_command_errors(capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "'ring'" in shown(capsys, "bipartite", "-m", "7", status=1)
    assert "one of 'exponential'" in shown(capsys, "cube", "-m", "8", status=1)
    assert "positive" in shown(capsys, "ring", "-m", "0", status=1)
    assert "28.8 GB: at most 2048" in shown(capsys, "full", "-m", "60000", status=1)
    assert "whole number of nodes" in shown(capsys, "ring", "-m", "7", "--node-size", "2", status=1)
    for out in (tmp_path / "none" / "a.png", tmp_path / "a.unknown"):
        assert cli.main(["topology", "ring", "-m", "3", "--out", str(out)]) == 1
        assert "hvd-slowmo topology: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["topology", "ring"])

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    original = builtins.__import__

    def absent(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert cli.main(["topology", "ring", "-m", "3", "--out", str(tmp_path / "a.png")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


def test_command_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["topology", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in NAMED)


@pytest.mark.parametrize("arguments", [["exponential", "-m", "12"], ["star", "-m", "1"], ["ring", "-m", "40"]])
@pytest.mark.slow
def test_command_draws(capsys: pytest.CaptureFixture[str], tmp_path: Any, arguments: list[str]) -> None:
    path = tmp_path / "a.png"
    assert f"drawn into {path}" in shown(capsys, *arguments, "--out", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_a_bug_is_not_taken_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(*_: object) -> str:
        raise ValueError("a bug")

    monkeypatch.setattr("hvd_slowmo.cli.topology.describe", describe)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["topology", "ring", "-m", "4"])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["topology", "exponential", "-m", "4"]], ids=["help", "table"])
@pytest.mark.sample("table")
def test_a_reader_that_has_ended_is_no_traceback(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hvd_slowmo.cli.main", *arguments]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, env=buffered)
    os.close(writing)
    assert result.stderr == ""
    assert result.returncode == 128 + signal.SIGPIPE
