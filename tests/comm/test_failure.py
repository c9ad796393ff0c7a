"""After a lost worker every exchange of a transport raises the same type, whichever thread has met the loss."""

import pytest
import torch.distributed as dist
from horovod.common.exceptions import HorovodInternalError

from hvd_slowmo.comm.failure import FailureLatch
from hvd_slowmo.comm.horovod import HorovodFailures


@pytest.mark.parametrize(
    ("latch", "kind"),
    [
        (HorovodFailures(1), HorovodInternalError),
        (FailureLatch("torch.distributed", 1, dist.DistNetworkError), dist.DistNetworkError),
    ],
    ids=["horovod", "torch"],
)
def test_the_type_stays_the_same(latch, kind):
    latch.refuse_after_failure()
    first = latch.lost("Connection reset by peer")
    assert type(first) is kind
    assert str(first).startswith("rank 1: a collective failed, most likely because another worker ended")
    for _ in range(2):
        with pytest.raises(kind, match=r"rank 1: nothing more can be exchanged .*Connection reset by peer") as raised:
            latch.refuse_after_failure()
        assert type(raised.value) is kind


def test_horovods_second_error_is_explained_by_the_first():
    latch = HorovodFailures(0)
    latch.explain(HorovodInternalError("Connection reset by peer"))
    second = latch.explain(HorovodInternalError("Horovod has been shut down"))
    assert type(second) is HorovodInternalError
    assert "Connection reset by peer" in str(second)


def test_a_mismatch_is_the_users_error_and_no_loss():
    latch = HorovodFailures(0)
    assert type(latch.explain(HorovodInternalError("Mismatched allreduce tensor shapes"))) is ValueError
    assert not latch.failed
