"""Compare the names and the order of all collectives with golden files, one per scenario for both frameworks.

Horovod matches collectives by name: workers whose collectives differ wait for each other forever, and a job of both
frameworks hangs as soon as one adapter differs. UPDATE_GOLDEN=1 rewrites the files. A changed file is a changed
protocol and raises WIRE in the handshake, so that workers of different versions refuse each other.
"""

import difflib
import os
from pathlib import Path

import numpy as np
import pytest

from hvd_slowmo.comm.protocol import SoloComm
from support.collectives import SCENARIOS, Record, RecordingComm, record

GOLDEN = Path(__file__).parent / "golden"
UPDATE = os.environ.get("UPDATE_GOLDEN", "") not in ("", "0")
CASES = [(name, framework) for name, scenario in SCENARIOS.items() for framework in scenario.frameworks]
SIMILAR = ("dpsgd", "gradients_all_join", "inner_state_average", "streamed")
"""Scenarios of which another one's Keras run has all collectives, under other names or in another number."""


def golden(name, framework):
    return GOLDEN / (f"{name}.{framework}.txt" if SCENARIOS[name].differs else f"{name}.txt")


def runs():
    for name, framework in CASES:
        traced = SCENARIOS[name].traced
        if framework == "torch" or traced != "only":
            marks = [pytest.mark.slow] * (framework == "keras")
            if framework == "keras" and name in SIMILAR:
                marks.append(pytest.mark.thorough)
            yield pytest.param(name, framework, False, id=f"{name}, {framework}", marks=marks)
        if framework != "torch":
            marks = [pytest.mark.slow, *([] if traced == "test" else [pytest.mark.thorough])]
            yield pytest.param(name, framework, True, id=f"{name}, {framework}, traced", marks=marks)


@pytest.mark.parametrize(("name", "framework", "traced"), list(runs()))
def test_collectives_are_those_of_the_golden_file(name, framework, traced, tmp_path):
    scenario, file = SCENARIOS[name], golden(name, framework)
    found = record(scenario, framework, tmp_path, traced)
    # The first run of a file writes it; the others must agree.
    if UPDATE and not traced and (scenario.differs or framework == scenario.frameworks[0]):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(found, encoding="utf-8")
    expected = file.read_text(encoding="utf-8") if file.exists() else ""
    if found != expected:
        difference = difflib.unified_diff(
            expected.splitlines(), found.splitlines(), str(file), f"{name}, {framework}", lineterm=""
        )
        pytest.fail("\n".join(difference), pytrace=False)


def test_every_golden_file_belongs_to_a_scenario():
    assert {file.name for file in GOLDEN.iterdir()} == {golden(*case).name for case in CASES}


def test_a_record_has_a_line_per_collective_in_the_phase_that_awaits_it():
    mine = Record()
    comm = RecordingComm(SoloComm(), mine, "node ")
    mine.phase("construction")
    assert comm.gather("a.digest", 3) == [3]
    for number in (1, 2):
        mine.phase(f"step {number}")
        comm.wait(comm.start_sum("a.ledger", np.zeros(2)))
    mine.phase("step 3")
    first = comm.start_sum("a.model.0", np.zeros(4, np.float32))
    comm.start_sum("a.model.1", np.zeros(1))
    mine.phase("join")
    second = comm.start_push("a.push.0", np.ones(1), np.array([[0.5], [0.0], [0.5]]))
    assert comm.wait(second).tolist() == [0.0]
    assert comm.wait(first).shape == (4,)
    assert mine.text("rank 0, ").splitlines() == [
        "# rank 0, construction",
        "node gather a.digest",
        "",
        "# rank 0, steps 1 to 2",
        "node sum a.ledger 2 float64",
        "",
        "# rank 0, step 3",
        "node sum a.model.1 1 float64 (never awaited)",
        "",
        "# rank 0, join",
        "node sum a.model.0 4 float32",
        "node push a.push.0 1 float64 to 0 2",
    ]
