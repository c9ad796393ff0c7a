"""Checkpoints of real workers in the middle of a block; runs that go on in the other framework or transport."""

import pytest

from support.trainings.checkpoints import apart

pytestmark = [pytest.mark.workers, pytest.mark.slow]


def check_refused(results, folder):
    for save, load in results:
        assert "in an existing directory" in save
        assert "there is no file" in load
    assert not list(folder.glob("after*"))
    assert len(list(folder.glob("checkpoint*"))) == 1, "an outer step's state with buffers reset is common"


@pytest.mark.thorough  # in one process: test_frameworks.py
def test_pytorch_and_then_keras(workers, keras_workers, tmp_path):
    """OSGP with messages in flight; momentum in the middle of a block."""
    runs = {}
    for case in ("osgp", "momentum"):
        asked = {"case": case, "path": tmp_path / case, "stop": 6, "end": 14}
        runs[case] = asked, workers(2).run("support.jobs.checkpoints:resumed", framework="torch", **asked)
        for different, _ in runs[case][1]:
            assert different == 0
    check_refused(workers(2).run("support.jobs.checkpoints:refused", framework="torch", path=tmp_path), tmp_path)
    for asked, whole in runs.values():
        theirs = keras_workers(2).run("support.jobs.checkpoints:continued", framework="tensorflow", **asked)
        for (_, ours), other in zip(whole, theirs, strict=True):
            assert apart(ours, other) < 1e-9


@pytest.mark.parametrize("case", ["osgp", "momentum"])
@pytest.mark.sample("momentum")
def test_a_run_goes_on_over_the_other_transport(horovod_workers, distributed_workers, tmp_path, case):
    """Bitwise, with two workers: a sum of two numbers has one order."""
    pools = [horovod_workers(2), distributed_workers(2)]
    for number, (first, second) in enumerate((pools, pools[::-1])):
        asked = {"framework": "torch", "case": case, "path": tmp_path / str(number), "stop": 6, "end": 14}
        whole = first.run("support.jobs.checkpoints:resumed", **asked)
        for (different, ours), other in zip(
            whole, second.run("support.jobs.checkpoints:continued", **asked), strict=True
        ):
            assert different == 0
            assert apart(ours, other) == 0


@pytest.mark.thorough
def test_keras_in_the_middle_of_a_block(keras_workers, tmp_path):
    asked = {"case": "momentum", "path": tmp_path / "keras", "stop": 6, "end": 10}
    for different, _ in keras_workers(2).run("support.jobs.checkpoints:resumed", framework="tensorflow", **asked):
        assert different == 0
    check_refused(
        keras_workers(2).run("support.jobs.checkpoints:refused", framework="tensorflow", path=tmp_path),
        tmp_path,
    )
    for equal in keras_workers(2).run("support.jobs.checkpoints:fitted", path=tmp_path):
        assert equal
        assert all(equal)
