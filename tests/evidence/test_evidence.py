"""The evidence: its statistics, its problem, and a page from nothing."""

import math
import os
import subprocess
import sys

import pytest
from evidence import page, theorem
from evidence.results import Key, Results, paired, spread
from evidence.runs import rate_of
from evidence.studies import FULL, STUDIES, Cell, methods

from hvd_slowmo import SlowMoConfig
from support.installation import ROOT


def test_a_gain_is_shown_where_its_interval_excludes_zero():
    base = [90.0, 91.0, 92.0, 93.0, 94.0]
    assert page.verdict([b + 1 + 0.1 * n for n, b in enumerate(base)], base) == "shown (+1.2 ± 0.1 points)"
    assert page.verdict([b - 1 - 0.1 * n for n, b in enumerate(base)], base).startswith("against it")
    # A mean of 2.5 standard errors: within Student's interval of five runs, 2.78 standard errors.
    noise = [1.0, -1.0, 1.0, -1.0, 0.0]
    deviation = math.sqrt(sum(x**2 for x in noise) / 4)
    shift = 2.5 * deviation / math.sqrt(5)
    assert page.verdict([b + shift + x for b, x in zip(base, noise, strict=True)], base).startswith("not shown")
    assert page.verdict([1.0], [0.0]) == "one seed shows nothing"


def test_spread_and_differences():
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert spread([math.nan, 1.0]) == "1.0, 1 of 2 diverged"
    assert spread([math.nan]) == "diverged"
    assert paired([2.0, 4.0], [1.0, 1.0]) == "+2.0 ± 1.0"
    assert paired([2.0, math.nan], [1.0, 1.0]) == "–"


def test_results_that_are_there_are_not_repeated(tmp_path):
    results = Results(tmp_path / "a.csv", ("accuracy",))
    key = Key("Local SGD", 8, 0.1, 3, 480)
    results.add(key, [97.25])
    again = Results(tmp_path / "a.csv", ("accuracy",))
    assert again.rows == results.rows
    assert again.of("Local SGD", 8) == [(97.25,)]
    other = key._replace(lr=0.2)
    again.add(other, [90.0])
    again.keep([other])  # another tuning has found another rate
    assert Results(tmp_path / "a.csv", ("accuracy",)).of("Local SGD", 8) == [(90.0,)]
    with pytest.raises(ValueError, match="other columns"):
        Results(tmp_path / "a.csv", ("loss",))


def test_the_slope_of_a_power():
    xs = [2**n for n in range(8)]
    found = theorem.slope(xs, [3 * x**-0.5 for x in xs])
    assert found.value == pytest.approx(-0.5)
    assert found.error == pytest.approx(0, abs=1e-9)


def test_the_gradient_norm_of_the_problem():
    import torch

    x = torch.linspace(-1, 1, theorem.DIMENSIONS, dtype=torch.float64, requires_grad=True)
    (x**2 / (1 + x**2)).sum().backward()
    assert theorem.squared_norm(x.detach()) == pytest.approx(float((x.grad**2).sum()))


def test_every_cell_has_a_tuned_rate():
    rates = {(cell.name, cell.workers): 0.1 for cell in methods(FULL)}
    for study in STUDIES.values():
        for cell in study(FULL):
            assert rate_of(cell, FULL, rates) == 0.1
    rates["Local SGD", 32] = 0.2
    cell = Cell("any", SlowMoConfig(), 20, "Local SGD")
    assert rate_of(cell, FULL, rates) == 0.2  # 20 is nearer to 32 than to 8


@pytest.mark.slow
@pytest.mark.thorough
def test_a_page_from_nothing(tmp_path):
    path = os.pathsep.join(str(ROOT / each) for each in ("benchmarks", "examples", "", "torch", "tf"))
    job = subprocess.run(
        [sys.executable, "-m", "evidence", "--size", "smoke", "--out", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert job.returncode == 0, job.stderr
    text = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    assert "nan" not in text
    assert text.count("| SGP |") == 1
    assert (tmp_path / "evidence_theorem.png").exists()
    assert (tmp_path / "evidence_tau.png").exists()
