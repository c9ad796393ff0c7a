"""Elastic jobs under horovodrun: a killed worker, a new one, and what an elastic job refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import hvd_slowmo.torch as slowmo
from hvd_slowmo.comm import naming
from hvd_slowmo.comm.elastic import ElasticState
from hvd_slowmo.comm.protocol import ScopedComm
from hvd_slowmo.comm.threads import ThreadWorld

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("localhost", "127.0.0.1", "127.1")  # of this machine, each a host to Horovod


def elastic(folder, names, steps, settings, victim="nobody", then=(), job="train_torch", **variables):
    """Run an elastic job to its end, and return what each worker that reached it has seen, by its host."""
    (folder / "hosts").write_text("".join(f"{name}:1\n" for name in names), encoding="utf-8")
    if then:
        (folder / "hosts.next").write_text("".join(f"{name}:1\n" for name in then), encoding="utf-8")
    script = folder / "discover.sh"
    script.write_text(f"#!/bin/sh\ncat {folder}/hosts\n", encoding="utf-8")
    script.chmod(0o755)
    path = os.pathsep.join([str(ROOT), str(ROOT / "torch"), str(ROOT / "tf"), os.environ.get("PYTHONPATH", "")])
    job = subprocess.run(
        [
            str(Path(sys.executable).with_name("horovodrun")),
            "--network-interfaces",
            "lo",
            "-np",
            str(len(names)),
            "--min-np",
            "1",
            "--max-np",
            "3",
        ]
        + ["--host-discovery-script", str(script), sys.executable]
        + [str(ROOT / "tests" / "support" / "elastic_jobs" / f"{job}.py"), str(folder), str(steps), victim, "30"]
        + [f"{name}={json.dumps(value)}" for name, value in settings.items()],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert job.returncode == 0, job.stderr
    return {each.stem: json.loads(each.read_text(encoding="utf-8")) for each in folder.glob("*.json")}


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"tau": 12}, marks=pytest.mark.thorough),  # beside the other framework in any case, below
        pytest.param({"tau": 12, "fragments": 12, "bits": 8}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "fragments": 4, "delay": 7}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "fragments": 12, "delay": 2, "bits": 8}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "gradients": "all"}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "warmup_steps": 40}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "beta": 0, "alpha": 1}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "shard": True, "fragments": 3}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "shard": True, "fragments": 4, "delay": 7}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "shard": True, "fragments": 12, "delay": 2, "bits": 8}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "gossip": "SGP"}, marks=pytest.mark.thorough),
        pytest.param({"tau": None, "gossip": "OSGP", "beta": 0}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_survivors_go_on_where_they_were(tmp_path, settings):
    found = elastic(tmp_path, NAMES, 120, settings, victim="127.1")
    assert set(found) == {"localhost", "127.0.0.1"}
    for seen in found.values():
        assert [change["workers"] for change in seen["changes"]] == [3, 2]
        # Nothing is lost: they go on at the step at which the third was missed, at the end of its block at the latest.
        assert 30 <= seen["changes"][1]["step"] <= 41 + settings.get("delay", 0)
        assert seen["changes"][1]["newcomers"] == []
        assert seen["steps"] in (120, 121)  # the batch of the interrupted step is taken once more
        assert seen["size"] == 2
    assert found["localhost"]["parameters"] == found["127.0.0.1"]["parameters"]


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"tau": 12}, marks=pytest.mark.thorough),  # beside the other framework in any case, below
        pytest.param({"tau": 12, "fragments": 4}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "warmup_steps": 60}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "inner_state": "average"}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "bits": 8, "shard": True}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "fragments": 12, "delay": 2, "bits": 8}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "shard": True, "fragments": 4, "delay": 1}, marks=pytest.mark.thorough),
        pytest.param({"tau": 12, "gossip": "OSGP"}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_keras_survivors_go_on_where_they_were(tmp_path, settings):
    found = elastic(tmp_path, NAMES, 4, settings, victim="127.1", job="train_keras")
    assert set(found) == {"localhost", "127.0.0.1"}
    for seen in found.values():
        assert [change["workers"] for change in seen["changes"]] == [3, 2]
        went_on = seen["changes"][1]["step"]
        assert 29 <= went_on <= 42
        # The step that was broken off is completed, and the epoch taken once more.
        (_, _), (epoch, step) = seen["calls"]
        assert step in (went_on, went_on + 1)
        assert seen["steps"] == step + 30 * (4 - epoch)
        assert (seen["size"], seen["epoch"]) == (2, 4)
    assert found["localhost"]["parameters"] == found["127.0.0.1"]["parameters"]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.workers
def test_an_elastic_keras_job_saves_and_is_resumed(tmp_path):
    """Survivors and newcomers of a job go on from where they are, and the next job from the last checkpoint."""
    first = elastic(tmp_path, NAMES, 3, {"tau": 12}, victim="127.1", job="train_keras", CHECKPOINTS="1")
    assert set(first) == {"localhost", "127.0.0.1"}
    for seen in first.values():
        assert [change["workers"] for change in seen["changes"]] == [3, 2]
        epoch, _ = seen["calls"][1]  # the one in which the worker was missed
        assert seen["epochs"] == list(range(epoch, 3))
    steps = first["localhost"]["steps"]
    again = elastic(tmp_path, NAMES[:2], 5, {"tau": 12}, job="train_keras", CHECKPOINTS="1")
    for seen in again.values():
        assert (seen["calls"], seen["epochs"]) == ([[0, 0]], [3, 4])
        assert (seen["steps"], seen["epoch"]) == (steps + 60, 5)
    assert again["localhost"]["parameters"] == again["127.0.0.1"]["parameters"]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.workers
def test_a_keras_loop_with_a_function_of_its_own(tmp_path):
    """Its errors are TensorFlow's own."""
    found = elastic(tmp_path, NAMES, 90, {"tau": 12}, victim="127.1", job="loop_keras")
    assert set(found) == {"localhost", "127.0.0.1"}
    for seen in found.values():
        assert [change["workers"] for change in seen["changes"]] == [3, 2]
        assert seen["steps"] in (90, 91)  # the batch of the interrupted step is taken once more
    assert found["localhost"]["parameters"] == found["127.0.0.1"]["parameters"]


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.workers
def test_a_new_keras_worker_takes_part(tmp_path):
    found = elastic(tmp_path, NAMES[:2], 40, {"tau": 12}, then=NAMES, job="train_keras")
    assert set(found) == set(NAMES)
    for name, seen in found.items():
        assert seen["changes"][-1]["workers"] == seen["size"] == 3
        assert seen["changes"][-1]["newcomers"] == [2]
        assert seen["epoch"] == 40
        assert seen["parameters"] == found["localhost"]["parameters"]
        assert len(seen["changes"]) == (1 if name == "127.1" else 2)


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.parametrize(
    ("victim", "settings"),
    [
        ("127.1", {"tau": 12}),
        pytest.param("127.0.0.1", {"tau": 12}, marks=pytest.mark.thorough),
        pytest.param("127.1", {"tau": 12, "fragments": 4, "delay": 1}, marks=pytest.mark.thorough),
        pytest.param("127.1", {"tau": 12, "warmup_steps": 60}, marks=pytest.mark.thorough),
    ],
    ids=str,
)
def test_survivors_of_both_frameworks_go_on_where_they_were(tmp_path, victim, settings):
    found = elastic(tmp_path, NAMES, 4, settings, victim=victim, job="train_mixed")
    assert set(found) == set(NAMES) - {victim}
    for seen in found.values():
        assert [change["workers"] for change in seen["changes"]] == [3, 2]
        assert 29 <= seen["changes"][1]["step"] <= 42
        assert (seen["size"], seen["epoch"]) == (2, 4)
    _compare_frameworks(found)


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.workers
@pytest.mark.parametrize("first", [("localhost", "127.1"), NAMES[:2]], ids=["Keras", "PyTorch"])
def test_a_new_worker_of_either_framework_takes_part(tmp_path, first):
    found = elastic(tmp_path, first, 40, {"tau": 12}, then=NAMES, job="train_mixed")
    assert set(found) == set(NAMES)
    for seen in found.values():
        assert seen["changes"][-1]["workers"] == seen["size"] == 3
        assert seen["changes"][-1]["newcomers"] == [2]
        assert seen["epoch"] == 40
    _compare_frameworks(found)


def _compare_frameworks(found):
    """Compare the sums of the parameters, which the frameworks hold in another order."""
    sums = [[float.fromhex(each) for each in seen["parameters"]] for seen in found.values()]
    for each in sums[1:]:
        assert each == pytest.approx(sums[0], rel=1e-12)
    assert len({seen["steps"] for seen in found.values()}) == 1


@pytest.mark.slow
@pytest.mark.workers
@pytest.mark.thorough
def test_the_others_go_on_without_a_worker_that_hangs(tmp_path):
    found = elastic(tmp_path, NAMES, 120, {"tau": 12}, victim="127.1", HANGS="1", HVD_SLOWMO_TIMEOUT="20")
    assert set(found) == {"localhost", "127.0.0.1"}
    for seen in found.values():
        assert [change["workers"] for change in seen["changes"]] == [3, 2]
        assert 30 <= seen["changes"][1]["step"] <= 41
        assert seen["steps"] in (120, 121)
    assert found["localhost"]["parameters"] == found["127.0.0.1"]["parameters"]


@pytest.mark.slow
@pytest.mark.workers
def test_a_new_worker_takes_part(tmp_path):
    found = elastic(tmp_path, NAMES[:2], 600, {"tau": 12}, then=NAMES)
    assert set(found) == set(NAMES)
    for name, seen in found.items():
        joined = seen["changes"][-1]
        assert joined["workers"] == seen["size"] == 3
        assert joined["newcomers"] == [2]
        assert joined["step"] >= 30
        assert seen["steps"] == 600
        assert seen["parameters"] == found["localhost"]["parameters"]
        assert len(seen["changes"]) == (1 if name == "127.1" else 2)


def test_without_the_elastic_launcher_the_function_runs_once():
    model = torch.nn.Linear(2, 1)
    optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, tau=2)
    state = slowmo.elastic.State(model, optimizer, epoch=3)

    @slowmo.elastic.run
    def train(state, factor):
        state.commit()
        return state.epoch * factor

    assert train(state, 2) == 6


def test_checkpoints_are_not_resumed_where_workers_have_made_steps(monkeypatch, tmp_path):
    """The function is called again whenever the workers have changed: they go on from where they are."""

    def made():
        model = torch.nn.Linear(2, 1)
        return model, slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, tau=2)

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            checkpoints.step(batch=optimizer.steps)

    model, optimizer = made()
    checkpoints = slowmo.Checkpoints(tmp_path, every=2)
    assert checkpoints.resume(optimizer) == 0
    train(model, optimizer, 3)
    before = model.weight.detach().clone()
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    assert (checkpoints.resume(optimizer), checkpoints.values) == (3, {})
    assert torch.equal(model.weight, before)
    train(model, optimizer, 3)
    checkpoints.finish()
    monkeypatch.delenv("HOROVOD_ELASTIC")
    model, optimizer = made()
    checkpoints = slowmo.Checkpoints(tmp_path, every=2)
    assert (checkpoints.resume(optimizer), checkpoints.values) == (6, {"batch": 6})


def test_a_function_without_a_state_is_told_what_it_needs():
    @slowmo.elastic.run
    def train(state):
        raise AssertionError("not called")

    with pytest.raises(TypeError, match=r"slowmo\.elastic\.State as its first argument\. Received: int"):
        train(3)


def test_another_optimizer_is_refused():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"must be a SlowMo or a sequence of them\. Received: SGD"):
        slowmo.elastic.State(model, [torch.optim.SGD(model.parameters(), lr=0.1)])


@pytest.mark.parametrize("name", ["commit", "sync", "changes"])
def test_a_value_can_not_hide_what_the_state_has(name):
    model = torch.nn.Linear(2, 1)
    optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, tau=2)
    with pytest.raises(ValueError, match=f"can't be called '{name}'"):
        slowmo.elastic.State(model, optimizer, **{name: 1})


def test_before_the_start_an_elastic_worker_says_how_to_start(monkeypatch):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    model = torch.nn.Linear(2, 1)
    optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, tau=2)
    assert optimizer.steps == 0
    for call in (optimizer.step, optimizer.join, lambda: optimizer.save("x"), optimizer.restart, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"in the function that slowmo\.elastic\.run decorates"):
            call()


@pytest.mark.filterwarnings("ignore:tau=None")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradients": "node"}, "gradients='node'"),
        ({"tau": None}, "tau=None with local gradients"),
        ({"parameter_map": slowmo.ParameterMap(), "shard": True}, "a parameter_map with few bits or shard=True"),
        ({"transport": "torch"}, "a transport"),
    ],
)
def test_settings_that_can_not_be_elastic_yet_are_refused(monkeypatch, settings, words):
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match=f"an elastic job can't have {words} yet"):
        slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, **{"tau": 2, **settings})


def test_an_optimizer_over_other_workers_is_refused_by_the_state(monkeypatch):
    model = torch.nn.Linear(2, 1)
    comm = ThreadWorld(1).member(0)
    optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm)
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    with pytest.raises(ValueError, match="construct SlowMo without comm="):
        slowmo.elastic.State(model, optimizer)
    with pytest.raises(ValueError, match="Received an empty sequence"):
        slowmo.elastic.State(model, [])


def test_optimizers_that_began_alone_have_the_names_that_newcomers_give_theirs(monkeypatch):
    """Else the second one would wait for the first one of the newcomer."""
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    naming.forget()
    model = torch.nn.Linear(2, 1)
    made = [slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, tau=2) for _ in range(2)]
    assert [each.worker.comm.name for each in made] == ["slowmo", "slowmo.1"]


def test_a_scaler_begins_a_new_step_after_one_that_was_broken_off():
    model = torch.nn.Linear(2, 1)
    optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, tau=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    state = slowmo.elastic.State(model, optimizer, scaler=scaler)

    def step():
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)

    def broken(*_):
        raise RuntimeError("lost")

    step()
    scaler.update()
    monkey, optimizer.worker.step = optimizer.worker.step, broken
    with pytest.raises(RuntimeError, match="lost"):
        step()
    optimizer.worker.step = monkey
    state.notice()
    before = model.weight.detach().clone()
    step()
    assert torch.allclose(before - model.weight, torch.full_like(before, 0.1), atol=1e-6)


def test_keras_workers_that_have_not_come_together_are_told_how(monkeypatch):
    keras = pytest.importorskip("keras")
    import hvd_slowmo.tf as slowmo_tf

    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    optimizer = slowmo_tf.SlowMo(keras.optimizers.SGD(0.1), tau=2)
    variable = keras.Variable([1.0])
    for call in (lambda: optimizer.broadcast([variable]), lambda: optimizer.apply([variable.value], [variable])):
        with pytest.raises(RuntimeError, match=r"in the function that slowmo\.elastic\.run decorates"):
            call()
    with pytest.raises(ValueError, match="an elastic job can't have gradients='node' yet"):
        slowmo_tf.SlowMo(keras.optimizers.SGD(0.1), tau=2, gradients="node")


def test_what_is_no_state_of_a_keras_job_is_refused():
    keras = pytest.importorskip("keras")
    import hvd_slowmo.tf as slowmo_tf

    with pytest.raises(TypeError, match=r"`model` must be a keras.Model. Received: int"):
        slowmo_tf.elastic.State(3)
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(slowmo_tf.SlowMo("sgd", tau=2), "mse")
    with pytest.raises(ValueError, match="has no variables yet"):
        slowmo_tf.elastic.State(model)
    with pytest.raises(TypeError, match=r"`state` must be a slowmo.elastic.State. Received: int"):
        slowmo_tf.SlowMoCallback(state=1)


@pytest.mark.slow
@pytest.mark.thorough
def test_threads_of_a_fit_that_was_broken_off_end_with_it():
    """Else a survivor of many changes holds those of all its datasets."""
    keras, tf = pytest.importorskip("keras"), pytest.importorskip("tensorflow")
    import hvd_slowmo.tf as slowmo_tf

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(slowmo_tf.SlowMo("sgd", tau=2), "mse")
    state = slowmo_tf.elastic.State(model, epoch=0)
    kept = []

    class Lost(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise RuntimeError("lost")

    def batches():
        yield from [(np.ones((4, 2), np.float32), np.ones((4, 1), np.float32))] * 4

    signature = (tf.TensorSpec((4, 2)), tf.TensorSpec((4, 1)))
    data = tf.data.Dataset.from_generator(batches, output_signature=signature)
    for _ in range(6):
        with pytest.raises(RuntimeError, match="lost"):
            model.fit(data, verbose=0, shuffle=False, callbacks=[slowmo_tf.SlowMoCallback(state=state), Lost()])
        state.notice()
        kept.append(psutil.Process().num_threads())
    assert kept[-1] <= kept[1] + 2


class Schedule:
    """A value with a state."""

    def __init__(self, rate):
        self.rate = rate

    def state_dict(self):
        return {"rate": self.rate}

    def load_state_dict(self, state):
        self.rate = state["rate"]


def test_values_come_from_the_first_worker_and_those_of_a_framework_from_its_own():
    def work(comm):
        state = ElasticState([], {"epoch": 10 + comm.rank})
        state.framework = "ab"[comm.rank % 2]
        if comm.rank % 2:
            state.schedule, state._names = Schedule(comm.rank), ("epoch", "schedule")
        state._take_values(ScopedComm(comm, "state"), [2, 3, 0, 1])
        return state.epoch, state.schedule.rate if comm.rank % 2 else None

    assert ThreadWorld(4).run(work) == [(12, None), (12, 3), (12, None), (12, 3)]


def test_states_with_other_values_are_refused_on_all_workers():
    def work(comm):
        state = ElasticState([], {"batch" if comm.rank == 1 else "epoch": 0})
        with pytest.raises(ValueError, match="rank 0 and rank 1 have different values: epoch and batch"):
            state._take_values(ScopedComm(comm, "state"), [0, 1, 2])

    ThreadWorld(3).run(work)
