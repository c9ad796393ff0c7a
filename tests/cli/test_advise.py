"""`hvd-slowmo advise`."""

from __future__ import annotations

import csv
import doctest
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_slowmo.advice.training import Training
from hvd_slowmo.cli import units
from hvd_slowmo.cli.advise import HEAD
from hvd_slowmo.cli.main import main
from support.installation import ROOT
from support.pool import PoolOf

PAPER = ["--bandwidth", "1gbit", "--latency", "0.5ms", "--workers", "64"]
STEP = ["--parameters", "25.2M", "--step-time", "180ms"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["advise", *arguments]) == status
    out, err = capsys.readouterr()
    assert (err if status == 0 else out) == ""
    return out if status == 0 else err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the last line of the error of a call that ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        main(["advise", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def cells(out: str) -> list[list[str]]:
    """Return the table's rows by the places of its columns."""
    lines = out.splitlines()
    rule = next(number for number, line in enumerate(lines) if line.startswith("---"))
    starts = [
        place for place, c in enumerate(lines[rule]) if c == "-" and (place == 0 or lines[rule][place - 1] == " ")
    ]
    end = next(number for number, line in enumerate(lines) if number > rule and not line)
    return [
        [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines[rule + 1 : end]
    ]


def test_a_table_on_paper(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, *STEP, *PAPER, "--tau", "12")
    assert out.startswith("64 workers on paper: 1000 Mbit/s each, 0.5 ms of latency.")
    assert "25,200,000 parameters (100.8 MB), 180 ms per step without communication\n" in out
    rows = {(row[0], row[3]): row for row in cells(out)}
    assert all(len(row) == len(HEAD) for row in rows.values())
    # 2 (m - 1) = 126 latencies, 7 of them, and 2 (m - 1) / m vectors at 125 MB/s: 2.0286 s
    assert rows["Local SGD", "32"] == ["Local SGD", "12", "1", "32", "349", "93.9 %", "16.54", "0", "0 %"]
    assert rows["SlowMo", "32"][7] == "201.6"
    assert rows["SGP", "32"][1:3] == ["", ""]
    assert rows["OSGP", "32"][4:] == ["809.9", "349.9 %", "100.8", "201.6", "22 %"]  # 0.8064 s and 7 latencies
    assert rows["D-PSGD", "32"][4:] == rows["SGP", "32"][4:]
    assert rows["SlowMo, streamed", "8"][2] == "12"
    assert "\nRecommended: SlowMoConfig.streaming(tau=4, bits=4), 180 ms, 0.0 %\n" in out
    assert "\nAlso below 5 %: SlowMoConfig(tau=226), " in out


def test_a_fast_network_needs_plain_training_only(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, *STEP, "--bandwidth", "200gbit", "--workers", "8")
    assert "Plain data-parallel training (AR-SGD, DistributedOptimizer) costs" in out
    assert "good enough" in out
    assert "Recommended" not in out


def test_the_share_changes_the_recommendation(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Also below 50 %: SlowMoConfig(tau=23), " in run(capsys, *STEP, *PAPER, "--share", "50%")


def test_nothing_may_suffice(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--parameters", "1B", "--step-time", "1ms", "--bandwidth", "1kbit", "--workers", "2")
    assert "no method stays below 5 % here" in out


def test_a_measured_step_takes_the_place_of_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    Training(0.18, 25_200_000, 100_800_000, 0.0, 0.09, 0.3, 50).save(path)
    assert run(capsys, "--measured", str(path), *PAPER) == run(capsys, *STEP, *PAPER)
    path.write_text("{}")
    error = run(capsys, "--measured", str(path), *PAPER, status=1)
    assert error.startswith("hvd-slowmo advise: ")
    assert error.endswith("is not a file of slowmo.measure(optimizer).save(path).\n")
    assert "No such file" in run(capsys, "--measured", str(tmp_path / "none"), *PAPER, status=1)


def test_the_table_as_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    out = run(capsys, *STEP, *PAPER, "--csv", str(path))
    assert out.endswith(f"Written: {path}\n")
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cells(out)) == 4 + 3 * 8
    assert [f"{1e3 * float(row['seconds']):.4g}" for row in rows] == [row[4] for row in cells(out)]
    assert rows[0]["settings"] == "SlowMoConfig.ar_sgd()"
    assert rows[-1]["settings"] == "SlowMoConfig.streaming(tau=48, bits=4)"


def test_missing_and_contradicting_options_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "give --measured FILE" in refused(capsys, *PAPER)
    assert "give --measured FILE" in refused(capsys, *PAPER, "--parameters", "1M")
    assert "leave out --parameters" in refused(capsys, *PAPER, *STEP, "--measured", str(tmp_path))
    assert "needs --bandwidth and --workers" in refused(capsys, *STEP, "--workers", "4")
    assert "needs --bandwidth and --workers" in refused(capsys, *STEP, "--latency", "1ms")
    assert "nothing to measure between one worker. Start it with: horovodrun -np 4" in refused(capsys, *STEP)
    assert "must be an integer >= 2. Received: 1" in refused(capsys, *STEP, *PAPER, "--workers", "1")


@pytest.mark.parametrize(
    ("option", "text", "allowed"),
    [
        ("--bandwidth", "1gb", "1gbit, 100mbit or 1.5GB/s"),
        ("--bandwidth", "1Mb/s", "1gbit, 100mbit or 1.5GB/s"),
        ("--bandwidth", "100", "1gbit, 100mbit or 1.5GB/s"),
        ("--bandwidth", "0gbit", "a positive bandwidth"),
        ("--latency", "5", "0.5ms, 50us or 0s"),
        ("--latency=-1ms", "", "0.5ms, 50us or 0s"),
        ("--step-time", "180", "180ms, 0.2s or 50us"),
        ("--step-time", "0ms", "a positive time"),
        ("--step-time", "nanms", "a positive time"),
        ("--step-time", "1e999s", "a positive time"),
        ("--parameters", "25.2m", "25.2M, 7B or 4096"),
        ("--parameters", "0", "a positive number"),
        ("--parameters", "1.5", "must be a whole number"),
        ("--share", "0.05", "percent such as 5%"),
        ("--share", "5 percent", "percent such as 5%"),
        ("--tau", "1", "an integer >= 2"),
    ],
)
def test_wrong_units_are_refused(capsys: pytest.CaptureFixture[str], option: str, text: str, allowed: str) -> None:
    error = refused(capsys, *STEP, *PAPER, option, *([text] if text else []))
    assert f"argument {option.partition('=')[0]}: must be " in error
    assert allowed in error
    assert error.endswith(f"Received: {text or '-1ms'}")


@pytest.mark.parametrize("text", ["1gbit", "1Gbit", "1gbit/s", "1Gbit/s", "1000mbit", "1 gbit", "125MB/s", "125e6kB/s"])
def test_bandwidths(text: str) -> None:
    assert units.bytes_per_second(text) == (125e9 if text == "125e6kB/s" else 125e6)


def test_the_examples_of_units() -> None:
    result = doctest.testmod(units)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.slow
def test_no_framework_is_needed_on_paper() -> None:
    code = (
        "import sys; from hvd_slowmo.cli.main import main; "
        f"main(['advise', *{[*STEP, *PAPER]!r}]); "
        "sys.exit(bool({'torch', 'tensorflow', 'keras', 'horovod'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_measuring_needs_pytorch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "torch", None)
    error = run(capsys, *STEP, status=1)
    assert error.startswith("hvd-slowmo advise: the links are measured with PyTorch, which cannot be imported (")
    assert error.endswith("Install it, or give --bandwidth and --workers.\n")


@pytest.mark.slow
@pytest.mark.workers
def test_workers_measure_their_links(workers: PoolOf, tmp_path: Path) -> None:
    pool, table = workers(2), tmp_path / "table.csv"
    first, second = pool.run("support.jobs.advice:advise", arguments=[*STEP, "--csv", str(table)])
    assert second == (0, "", "")
    status, out, err = first
    assert (status, err) == (0, "")
    assert out.startswith("2 workers, measured:\n  sum ")
    assert "  a message between neighbours takes " in out
    assert len(cells(out)) == 4 + 3 * 8
    assert "Plain data-parallel training" in out
    with table.open(encoding="utf-8") as file:
        rows = {row["settings"]: float(row["seconds"]) for row in csv.DictReader(file)}
    assert rows["SlowMoConfig.local_sgd(tau=4)"] > rows["SlowMoConfig.local_sgd(tau=12)"] > 0.18

    # A file that rank 0 can't read ends the command on all.
    first, second = pool.run("support.jobs.advice:advise", arguments=["--measured", str(tmp_path / "none")])
    assert first[:2] == (1, "")
    assert "No such file" in first[2]
    assert second == (1, "", "")
