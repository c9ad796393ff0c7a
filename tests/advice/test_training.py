"""Files of a measured training run."""

import json
import math

import pytest

from hvd_slowmo.advice.training import Training, load_training, training_of

MEASURED = Training(0.18, 25_200_000, 100_800_000, 0.17, 0.09, 0.3, 50)


def test_a_file_has_everything(tmp_path):
    MEASURED.save(tmp_path / "step.json")
    assert load_training(tmp_path / "step.json") == MEASURED
    assert training_of(1000, 0.1, work=0.05) == Training(0.1, 1000, 4000, 0.05, 0.05)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{}",
        "\xff",
        json.dumps({**MEASURED._asdict(), "more": 1}),
        json.dumps({**MEASURED._asdict(), "seconds": "0.18"}),
        json.dumps({**MEASURED._asdict(), "seconds": -1}),
        json.dumps({**MEASURED._asdict(), "seconds": True}),
        json.dumps({**MEASURED._asdict(), "parameters": 2.5}),
        json.dumps({**MEASURED._asdict(), "work": math.nan}),
    ],
)
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "step.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"step\.json is not a file of slowmo\.measure"):
        load_training(path)


def test_a_file_without_a_step_is_refused(tmp_path):
    MEASURED._replace(seconds=0).save(tmp_path / "step.json")
    with pytest.raises(ValueError, match="must be positive"):
        load_training(tmp_path / "step.json")
