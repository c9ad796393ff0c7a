"""SlowMo under launchers and in loops of other libraries: the models of a plain loop under torchrun, bitwise."""

from __future__ import annotations

import re
import sys

import pytest
from running import EXAMPLES, horovodrun, job, torchrun

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.workers]


def reports(output: str) -> list[tuple[str, ...]]:
    """Return rank, accuracy and the fingerprint of the weights in each worker's line, by rank."""
    found = re.findall(r"rank (\d) of 2: test accuracy (\d+\.\d) %, weights (\w{16})", output)
    assert len(found) == 2, output
    return sorted(found)


@pytest.fixture(scope="module")
def of_function() -> list[tuple[str, ...]]:
    """The reports of the function that launchers start, from a plain script."""
    expected = reports(torchrun(2, EXAMPLES / "launch_function.py"))
    assert float(expected[0][1]) > 95
    return expected


@pytest.fixture(scope="module")
def of_loop() -> list[tuple[str, ...]]:
    """The reports of a plain loop."""
    expected = reports(torchrun(2, EXAMPLES / "circle_torch.py"))
    assert float(expected[0][1]) > 95
    return expected


@pytest.mark.parametrize("launcher", ["ray", "spark"])
def test_a_launched_function_trains_as_a_script_does(launcher: str, of_function: list[tuple[str, ...]]) -> None:
    assert reports(job(sys.executable, EXAMPLES / "launch_function.py", "--with", launcher)) == of_function


@pytest.mark.parametrize("library", ["accelerate", "fabric", "lightning"])
def test_a_loop_of_another_library_trains_as_a_plain_one(library: str, of_loop: list[tuple[str, ...]]) -> None:
    assert reports(torchrun(2, EXAMPLES / f"{library}_torch.py")) == of_loop


def test_lightning_over_horovod_trains_alike(of_loop: list[tuple[str, ...]]) -> None:
    assert reports(horovodrun(2, EXAMPLES / "lightning_torch.py")) == of_loop
