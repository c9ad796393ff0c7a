"""Keras models that are given values by other means than steps; several optimizers in one training."""

import keras
import numpy as np
import pytest

from hvd_slowmo.tf import SlowMo, SlowMoCallback, SlowMoConfig
from support.jobs.keras_changed import between_fits

pytestmark = [
    pytest.mark.workers,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]


def made():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    optimizer = SlowMo(keras.optimizers.SGD(0.1), SlowMoConfig(tau=2, beta=0.5))
    model.compile(optimizer, "mse")
    return model, optimizer


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["load", "average", "restart", "nothing"])
def test_values_that_are_loaded_between_two_fits_are_no_progress(keras_workers, how):
    for rank, (weight, said) in enumerate(keras_workers(2).run("support.jobs.keras_changed:between_fits", how=how)):
        assert weight == 1.0
        assert len(
            [line for line in said if "given other values after the last training on rank 0, rank 1" in line]
        ) == (how in ("load", "average")), (rank, said)


@pytest.mark.parametrize("how", ["load", "average", "restart", "nothing"])
@pytest.mark.sample("load", "nothing")
def test_nor_are_they_of_a_single_worker(how):
    weight, said = between_fits(how)
    assert weight == 1.0
    assert sum("given other values after the last training on rank 0" in line for line in said) == (
        how in ("load", "average")
    )


@pytest.mark.parametrize("by", ["SlowMo", "Keras"])
def test_a_saved_state_tells_of_them(by, tmp_path, caplog):
    """The weight given between two fits is no progress of a block in the resumed training either."""

    x = np.ones((12, 1), np.float32)
    model, optimizer = made()
    model.fit(x, x, batch_size=4, verbose=0, callbacks=[SlowMoCallback()])
    model.set_weights([np.ones((1, 1), np.float32)])
    if by == "SlowMo":
        optimizer.save(tmp_path / "a", model)
        again, other = made()
        other.load(tmp_path / "a", again)
    else:
        model.save(tmp_path / "a.keras")
        again = keras.models.load_model(tmp_path / "a.keras")
    for each in (model, again):
        caplog.clear()
        each.fit(0 * x, x, batch_size=2, verbose=0, callbacks=[SlowMoCallback()])
        assert each.get_weights()[0].item() == 1.0
        assert "given other values after the last training on rank 0" in caplog.text
    caplog.clear()
    again.fit(0 * x, x, batch_size=2, verbose=0, callbacks=[SlowMoCallback()])
    assert not caplog.text


class Scaling(keras.callbacks.Callback):
    """Callback that changes the weight after each epoch and then saves, as Checkpoints do between two epochs."""

    def __init__(self, optimizer, path):
        super().__init__()
        self.optimizer, self.path = optimizer, path

    def on_epoch_end(self, epoch, logs=None):
        self.model.set_weights([0.9 * w for w in self.model.get_weights()])
        self.optimizer.save(self.path / str(epoch), self.model)
        self.model.save(self.path / f"{epoch}.keras")


@pytest.mark.parametrize("by", ["SlowMo", "Keras"])
def test_changes_between_two_epochs_of_a_fit_are_a_part_of_it_and_resume_so(by, tmp_path, caplog):
    x = np.ones((12, 1), np.float32)

    def train(model, optimizer, epochs):
        callbacks = [SlowMoCallback(), Scaling(optimizer, tmp_path)]
        model.fit(x, x, batch_size=4, epochs=epochs, verbose=0, callbacks=callbacks)
        return model.get_weights()[0].item()

    whole = train(*made(), 3)
    if by == "SlowMo":
        model, optimizer = made()
        optimizer.load(tmp_path / "1", model)
    else:
        model = keras.models.load_model(tmp_path / "1.keras")
        optimizer = model.optimizer
    assert train(model, optimizer, 1) == whole
    assert "given other values" not in caplog.text


def test_a_save_tells_of_other_values_and_changes_nothing(tmp_path, caplog):
    """Values that are put into the model, saved and taken out again have never been there for the training."""
    x = np.ones((12, 1), np.float32)
    model, optimizer = made()
    model.fit(x, x, batch_size=4, verbose=0, callbacks=[SlowMoCallback()])
    own = model.get_weights()
    model.set_weights([np.ones((1, 1), np.float32)])
    optimizer.save(tmp_path / "a", model)
    model.save(tmp_path / "a.keras")
    model.set_weights(own)
    model.fit(x, x, batch_size=4, verbose=0, callbacks=[SlowMoCallback()])
    assert "given other values" not in caplog.text


def test_restart_begins_a_block_from_rank_0s_values(keras_workers):
    for found, said in keras_workers(2).run("support.jobs.keras_changed:restarted"):
        assert found == [5.0, 5.0]
        assert "number of steps at restart(): it has 6 where 7 is expected" in said


def test_broadcasts_that_were_left_in_a_script_of_horovods_do_no_harm(keras_workers):
    """They give all workers what rank 0 has after its first step: from there the blocks are the algorithm's."""
    results = keras_workers(2).run("support.jobs.keras_changed:broadcasts_left_in")
    begin = results[0][0]
    outer, v, momentum, anchor = [begin, begin], 0.0, [0.0, 0.0], begin
    for step in range(1, 9):
        momentum = [0.5 * m + 0.25 * (1 + rank) for rank, m in enumerate(momentum)]
        outer = [x + m for x, m in zip(outer, momentum, strict=True)]
        if step == 1:
            outer, momentum = [outer[0]] * 2, [momentum[0]] * 2
        if step % 3 == 0:
            v = 0.5 * v + (anchor - sum(outer) / 2) / 0.25
            anchor -= 0.25 * v
            outer = [anchor, anchor]
    for found in results:
        assert found == (begin, pytest.approx(sum(outer) / 2, rel=1e-6), 8)


@pytest.mark.thorough
def test_one_join_answers_the_exchanges_of_all_optimizers(keras_workers):
    """Two workers, 2 and 5 steps: each optimizer's result is the one that it has alone."""
    results = keras_workers(2).run("support.jobs.keras_changed:joined_together", lengths=[2, 5])
    assert results[0][0] == results[1][0]
    assert [behind for _, behind in results] == [[3, 3], [0, 0]]
    assert results[0][0][1] == pytest.approx(2 * results[0][0][0])
