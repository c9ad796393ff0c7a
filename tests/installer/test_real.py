"""The doctor and the checks in the environment of the tests; test_alone.py covers new environments."""

import pytest

from hvd_slowmo.installer import check, recipe
from support.installation import ROOT, python_here, run

pytestmark = [pytest.mark.slow, pytest.mark.workers]


@pytest.mark.thorough
def test_the_doctor_is_content_with_the_development_environment():
    said = run(python_here, "-m", "hvd_slowmo.cli.main", "doctor", cwd=ROOT)
    assert "Training works here" in said
    assert "Two workers summed a tensor over torch.distributed (gloo" in said
    assert "Two workers summed a tensor over Horovod with PyTorch" in said
    assert "Two workers summed a tensor over Horovod with TensorFlow" in said
    assert "Horovod's stall check: repaired" in said
    assert "Horovod's elastic recovery: repaired" in said
    assert "Horovod's signed services: repaired (a stranger's requests were refused)" in said
    assert "Horovod's launcher: repaired" in said


def test_the_stall_check_of_our_build_reports_a_tensor_that_never_comes():
    built = recipe.installed()
    assert built is not None, "this environment's Horovod was not built by `hvd-slowmo install-horovod`: run make setup"
    assert "stall check" in built.repairs
    assert check.stall("torch").error is None


def test_the_launcher_knows_its_build_without_importing_a_framework():
    asked = (
        "import sys; from horovod.common.util import gloo_built, mpi_built; "
        "sys.modules.update(dict.fromkeys(('horovod.tensorflow', 'horovod.torch')));"  # in forked processes too
        "print(mpi_built(), gloo_built())"
    )
    assert run(python_here, "-c", asked, cwd=ROOT).split() == ["False", "True"]


def test_a_check_that_fails_says_what_the_workers_said():
    result = check.allreduce("torch", time_limit=0.2)
    assert result.error is not None
    assert result.error.startswith("no result within 0.2 s")
    assert result.seconds < 30
