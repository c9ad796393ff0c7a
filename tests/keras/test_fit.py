"""SlowMoCallback on real Horovod workers: `model.fit`, with Keras' own callbacks beside it."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from hvd_slowmo.tf import SlowMo, SlowMoCallback, SlowMoConfig

pytestmark = [pytest.mark.workers, pytest.mark.slow]


def alike(results, *keys):
    for key in keys:
        for other in results[1:]:
            assert len(other[key]) == len(results[0][key])
            assert all(np.array_equal(a, b) for a, b in zip(other[key], results[0][key], strict=True)), key


def check(results, steps, traces=1):
    """All hold the same, at the same step; the step was traced once, and the join never."""
    alike(results, "weights", "vectors")
    for result in results:
        assert result["steps"] == result["iterations"] == steps
        assert result["traces"] == traces
        assert all(np.isfinite(w).all() for w in result["weights"])


def model_of(optimizer):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model


def slowmo():
    return SlowMo(keras.optimizers.SGD(0.1), SlowMoConfig(tau=2))


# One worker, no Horovod


def test_another_optimizer_is_refused():
    x = np.zeros((8, 4), np.float32)
    with pytest.raises(TypeError, match=r"compiled with SlowMo\. Its optimizer is: SGD"):
        model_of("sgd").fit(x, x[:, :1], verbose=0, callbacks=[SlowMoCallback()])


class Wrapper(keras.callbacks.Callback):
    """Hands on to another callback, which is in no list."""

    def __init__(self, other):
        super().__init__()
        self.other = other

    def set_model(self, model):
        self.other.set_model(model)

    def on_train_begin(self, logs=None):
        self.other.on_train_begin(logs)


def test_a_callback_within_another_is_refused():
    x = np.zeros((8, 4), np.float32)
    with pytest.raises(ValueError, match="Give it to fit"):
        model_of(slowmo()).fit(x, x[:, :1], verbose=0, callbacks=[Wrapper(SlowMoCallback())])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_it_goes_to_the_front(place):
    others = [keras.callbacks.LambdaCallback(), keras.callbacks.LambdaCallback()]
    mine = SlowMoCallback()
    callbacks = keras.callbacks.CallbackList([*others[:place], mine, *others[place:]], model=model_of(slowmo()))
    assert callbacks.callbacks[:3] == [mine, *others]


def test_one_worker_alone_trains():
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    model = model_of(slowmo())
    history = model.fit(x, x[:, :1], batch_size=8, epochs=3, verbose=0, callbacks=[SlowMoCallback()])
    assert model.optimizer.steps == 15
    assert history.history["loss"][-1] < history.history["loss"][0]


# Real workers

TRAININGS = {
    "equal": ([4, 4, 4], {}),
    "uneven": ([5, 3, 4], {"validates": True}),
    "none": ([4, 0, 2], {"data_kind": "dataset", "validates": True}),
    "short epochs": ([1, 2, 1], {"tau": 12, "epochs": 5}),
    "executions of 3": ([7, 4, 2], {"steps_per_execution": 3}),
    "executions of 4": ([4, 0, 9], {"data_kind": "unknown", "steps_per_execution": 4, "validates": True}),
    "unknown length": ([7, 5, 6], {"data_kind": "unknown"}),
    "unknown length, executions of 3": ([7, 5, 6], {"data_kind": "unknown", "steps_per_execution": 3}),
    "unbuilt": ([4, 3, 5], {"model_kind": "unbuilt", "data_kind": "unknown"}),
    "unbuilt, executions of 3": ([6, 3, 6], {"model_kind": "unbuilt", "steps_per_execution": 3}),
    "unbuilt, none": ([3, 0, 2], {"model_kind": "unbuilt", "data_kind": "dataset"}),
    "unbuilt, eager": ([2, 3, 2], {"model_kind": "unbuilt", "data_kind": "dataset", "run_eagerly": True}),
    "subclassed": ([4, 3, 5], {"model_kind": "subclassed"}),
    "functional": ([4, 3, 5], {"model_kind": "functional"}),
    "several fits": ([4, 5, 3], {"fits": 2}),
    "compiled": ([4, 5, 3], {"jit_compile": True}),
    "eager": ([2, 3, 2], {"run_eagerly": True}),
}
FAST = {"uneven", "unbuilt", "executions of 4"}


def train(pool, name):
    lengths, options = TRAININGS[name]
    lengths = lengths[: pool.size]
    results = pool.run("support.jobs.keras_fit:trains", lengths=lengths, **options)
    epochs = options.get("epochs", 3) * options.get("fits", 1)
    check(results, steps=epochs * max(lengths))
    for result in results:
        assert result["history"] == results[0]["history"], "workers differ in their metrics"
        assert len(result["seen"]) == epochs
    # A callback that was given before SlowMoCallback sees the mean at the end of every epoch all the same.
    for each in zip(*(result["seen"] for result in results), strict=True):
        for _, logs, weights in each[1:]:
            assert logs == each[0][1]
            assert all(np.array_equal(a, b) for a, b in zip(weights, each[0][2], strict=True))
    said = [line for line in results[0]["log"] if "XLA" in line]
    assert len(said) == (name == "compiled"), results[0]["log"]


@pytest.mark.parametrize("name", sorted(FAST))
@pytest.mark.sample("uneven")
def test_two_workers_train(keras_workers, name):
    train(keras_workers(2), name)


def test_metrics_are_means_over_all_samples(keras_workers):
    results = keras_workers(2).run("support.jobs.keras_fit:still")
    for prefix in ("", "val_"):
        errors = np.concatenate([result["errors"][prefix] for result in results])
        for result in results:
            history = result["history"]
            assert history[f"{prefix}loss"][0] == pytest.approx(np.square(errors).mean(), rel=1e-5)
            assert history[f"{prefix}mae"][0] == pytest.approx(np.abs(errors).mean(), rel=1e-5)


REFUSED = {
    "nan": "averaged inner state are not finite (NaN or infinity) on rank 1",
    "tau": "ValueError: slowmo: rank 1 differs from rank 0: config: tau: it has 5 where 3 is expected",
    "Horovod's callback": "LearningRateWarmupCallback: a schedule as the learning rate, without hvd.size() in it",
    "unbuilt, Horovod's callback": "Horovod's callbacks do not work with Keras 3 and SlowMo",
    "no callback": "2 workers, and they have not been brought to one start. Give fit() a SlowMoCallback()",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_misuse_raises_on_every_rank(keras_workers, kind):
    for said in keras_workers(2).run("support.jobs.keras_fit:refused", kind=kind):
        assert REFUSED[kind] in said


@pytest.mark.parametrize("kind", ["sequential", "unbuilt"])
@pytest.mark.thorough
def test_a_fit_with_the_callback_works_after_one_without(keras_workers, kind):
    results = keras_workers(2).run("support.jobs.keras_fit:recovers", kind=kind)
    check(results, steps=3)
    assert all(any(w.any() for w in result["weights"]) for result in results)


@pytest.mark.parametrize("name", sorted(set(TRAININGS) - FAST))
@pytest.mark.sample("compiled")
def test_two_workers_train_in_every_way(keras_workers, name):
    train(keras_workers(2), name)


def test_callbacks_that_look_at_metrics_decide_alike(keras_workers, tmp_path):
    results = keras_workers(2).run("support.jobs.keras_fit:decides", folder=str(tmp_path))
    alike(results, "weights")
    first = results[0]
    for result in results:
        assert result["history"] == first["history"]
        assert result["stopped"] == first["stopped"] == len(first["seen"]) - 1 > 0
        _, _, best = first["seen"][result["best"]]
        assert all(np.array_equal(a, b) for a, b in zip(result["weights"], best, strict=True))
    rates = first["history"]["learning_rate"]
    assert rates[-1] < rates[0], "the plateau's rate is part of this test"
    # Files of rank 0 alone
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    model.load_weights(tmp_path / "best.weights.h5")
    _, _, last = first["seen"][-1]
    assert all(np.array_equal(v.numpy(), w) for v, w in zip(model.weights, last, strict=True))
    assert len((tmp_path / "log.csv").read_text().splitlines()) == len(first["seen"]) + 1


@pytest.mark.thorough  # on one worker: test_settings.py
def test_learning_rate_scheduler(keras_workers):
    results = keras_workers(2).run("support.jobs.keras_fit:schedules")
    check(results, steps=9)
    assert results[0]["history"]["learning_rate"] == pytest.approx([0.01, 0.005, 0.01 / 3])


@pytest.mark.thorough
def test_a_resume_from_own_files_is_the_run_without_a_stop(keras_workers, tmp_path):
    whole = keras_workers(2).run("support.jobs.keras_fit:resumes", folder=str(tmp_path / "a"), stop=False)
    again = keras_workers(2).run("support.jobs.keras_fit:resumes", folder=str(tmp_path / "b"), stop=True)
    check(whole, steps=20)
    check(again, steps=20)
    alike([whole[0], again[0]], "weights", "vectors")


@pytest.mark.thorough
def test_a_resume_on_rank_0_alone(keras_workers, tmp_path):
    results = keras_workers(2).run("support.jobs.keras_fit:resumes", folder=str(tmp_path), stop=True, everyone=False)
    alike(results, "weights", "vectors")
    # Rank 0 is done after its fourth epoch, at step 20; rank 1 is in its third then, and ends with it.
    assert [result["steps"] for result in results] == [25, 25]
    assert any("begin at different epochs: rank 0 at 2, rank 1 at 0" in line for line in results[0]["log"])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("epochs", [[5, 2], [2, 5]])
@pytest.mark.sample("epochs0-False")
def test_a_worker_that_leaves_ends_the_others(keras_workers, epochs, own):
    results = keras_workers(2).run("support.jobs.keras_fit:leaves", epochs=epochs, own=own)
    leaver = epochs.index(2)
    assert [result["epochs"] for result in results] == [2 + (rank != leaver) for rank in range(2)]
    assert f"INFO: ranks [{leaver}] have ended their training" in "".join(results[1 - leaver]["log"])


@pytest.mark.thorough  # in one process: test_threads.py
def test_different_rates_are_a_warning(keras_workers):
    first, second = keras_workers(2).run("support.jobs.keras_fit:warns")
    said = [line for line in first if line.startswith("WARNING") and "learning rate" in line]
    assert len(said) == 1, first
    assert len([line for line in second if "learning rate" in line]) == 1


def test_an_error_in_one_workers_callback_ends_the_job(keras_workers):
    first, second = keras_workers(2).outcomes("support.jobs.keras_fit:fails", fatal=True)
    assert second.kind == "ArithmeticError"
    assert "rank 1 ended, was killed or has not come" in str(first)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["uneven", "none", "unknown length, executions of 3", "short epochs"])
def test_three_workers_train(keras_workers, name):
    train(keras_workers(3), name)


@pytest.mark.thorough
def test_two_go_on_to_their_join_when_a_third_leaves(keras_workers):
    results = keras_workers(3).run("support.jobs.keras_fit:leaves", epochs=[4, 2, 4])
    assert [result["epochs"] for result in results] == [3, 2, 3]
    alike([results[0], results[2]], "weights", "vectors")
