"""The Keras adapter on real Horovod workers: misuse, starts, half precision, process sets, collectives that stay."""

import numpy as np
import pytest

from support.models.keras import same
from support.pool import Pool

pytestmark = [pytest.mark.workers, pytest.mark.slow]

MISUSE = {
    "tau": "ValueError: slowmo: rank 1 differs from rank 0: config: tau: it has 3 where 2 is expected",
    "shape": "parameters, entry 0: it has parameter v [3] float32 0 where parameter v [2] float32 0 is expected",
    "argument": "`variables` must be Keras variables, model.variables. Received: ",
    "steps": "the workers are not at the same step: rank 0 step 5, rank 1 step 2",
    "parameter": "averaged inner state are not finite (NaN or infinity) on rank 1 after step 2",
}
CASES = ["constant", "constant_in_a_loop", "merged", "unused"]


def test_misuse_on_one_rank_raises_on_every_rank(keras_workers):
    for kind, words in MISUSE.items():
        for said in keras_workers(2).run("support.jobs.keras:misuse", kind=kind):
            assert words in said, kind


def test_losses_are_averaged(keras_workers):
    for _ in range(2):  # every call makes its collectives anew, under the same names
        assert keras_workers(2).run("support.jobs.keras:averaged_loss") == [(0.75, [0.5, 1.0])] * 2


def test_starts(keras_workers):
    first, second = keras_workers(2).run("support.jobs.keras:starts", kind="fresh")
    assert same(first, second)
    assert first[-1].tolist() == [0, 0]
    first, second = keras_workers(2).run("support.jobs.keras:starts", kind="rank 0")
    assert same(first, second)
    assert first[-1].tolist() == [4, 4]
    assert (first[-2] == 1).all()
    first, second = keras_workers(2).run("support.jobs.keras:starts", kind="all")
    assert not np.array_equal(first[0], second[0])
    assert (second[-2] == 2).all()
    assert first[-1].tolist() == second[-1].tolist() == [4, 4]


def test_all_types_are_handed_out_bitwise(keras_workers):
    for small in (0, 1024):
        first, second = keras_workers(2).run("support.jobs.keras:handed_out", small=small)
        assert same(first, second), small


@pytest.mark.slow
def test_overflows_on_one_worker_leave_all_equal_and_nothing_hangs(keras_workers):
    first, second = keras_workers(2).run("support.jobs.keras:half")
    assert same(first["weights"], second["weights"])
    assert np.isfinite(np.concatenate([w.reshape(-1) for w in first["weights"]])).all()
    assert first["steps"] == second["steps"] == 12
    assert min(first["scale"], second["scale"]) < 2.0**15


@pytest.mark.slow
def test_the_callback_switches_xla_off(keras_workers):
    first, second = keras_workers(2).run("support.jobs.keras:compiled_by_xla")
    assert same(first, second)


@pytest.mark.parametrize("case", CASES)
def test_no_collective_is_lost(keras_workers, case):
    from support.jobs.keras_effects import expected

    for traced in (False, True):
        for result in keras_workers(2).run("support.jobs.keras_effects:exchanged", case=case, traced=traced):
            assert result == expected(case, 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_grappler_loses_horovods_own_operations_and_none_of_ours(keras_workers, case):
    ours = keras_workers(1).run("support.jobs.keras_effects:kept", case=case, safe=True)[0]
    assert ours["left"] == ours["written"] > 0
    bare = keras_workers(1).run("support.jobs.keras_effects:kept", case=case, safe=False)[0]
    assert bare["left"] < bare["written"]


@pytest.mark.slow
def test_process_sets_train_apart():
    pool = Pool(3, "horovod.tensorflow", HOROVOD_DYNAMIC_PROCESS_SETS="1")
    try:
        assert pool.run("support.jobs.keras:halves", sets=[[0, 2], [1]]) == [
            [6.0] * 2,
            [6.0] * 2,
            [6.0] * 2,
        ]
    finally:
        pool.close()
