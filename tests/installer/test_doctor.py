"""The doctor's report on the repairs of Horovod, with checks that are replaced by their results."""

import pytest

from hvd_slowmo.installer import check, doctor, recipe, repairs, sdist
from hvd_slowmo.installer.doctor import Level
from hvd_slowmo.installer.options import Options
from support.installation import TORCH

pytest.importorskip("horovod")


def report(monkeypatch, built, stall, strangers):
    """Return the findings on repairs, where Horovod has this record and the checks have these errors."""
    monkeypatch.setattr(doctor, "detect", lambda: (TORCH,))
    monkeypatch.setattr(recipe, "installed", lambda: built)
    monkeypatch.setattr(check, "allreduce", lambda _: check.Result(None, 1.0, {"gloo": True}))
    monkeypatch.setattr(check, "stall", lambda _: check.Result(stall, 1.0))
    monkeypatch.setattr(check, "strangers", lambda: check.Result(strangers, 0.1))
    names = tuple(f"Horovod's {repair.name}: " for repair in repairs.REPAIRS)
    return [finding for finding in doctor.examine({"PATH": "/usr/bin"}) if finding.text.startswith(names)]


def test_the_doctor_names_each_repair_that_is_there(monkeypatch):
    built = recipe.recipe(sdist.HOROVOD, (TORCH,), Options(), {})
    findings = report(monkeypatch, built, "not asked, because the record says it", None)
    assert [finding.level for finding in findings] == [Level.OK] * 4
    assert [finding.text.split(" (")[0] for finding in findings] == [
        "Horovod's stall check: repaired",
        "Horovod's elastic recovery: repaired",
        "Horovod's signed services: repaired",
        "Horovod's launcher: repaired",
    ]


def test_the_doctor_warns_of_each_repair_that_is_missing_and_says_what_for(monkeypatch):
    findings = report(monkeypatch, None, "no error was raised", "it serves unsigned requests")
    assert [finding.level for finding in findings] == [Level.WARNING] * 4
    for finding, repair in zip(findings, repairs.REPAIRS, strict=True):
        assert finding.text == f"Horovod's {repair.name}: not repaired: {repair.without}"
        assert finding.fix == "run `hvd-slowmo install-horovod`."


def test_a_horovod_from_elsewhere_is_judged_by_what_it_does(monkeypatch):
    findings = report(monkeypatch, None, None, None)
    assert [finding.level for finding in findings] == [Level.OK, Level.WARNING, Level.OK, Level.WARNING]
