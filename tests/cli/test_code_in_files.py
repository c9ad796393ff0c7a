"""Files that would run code: the code does not run, and the message says why the file is refused."""

import json
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

# isort: split
# PyTorch comes first: the other way round its libraries may not load.
import keras
from keras import layers as kl

from hvd_slowmo.cli.main import main
from hvd_slowmo.errors import CheckpointError
from hvd_slowmo.tf import SlowMo as KerasSlowMo
from hvd_slowmo.tf import SlowMoConfig

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own, in saving

MODELS = """
import keras
from keras import layers as kl
from torch import nn

def ours():
    return nn.Sequential(nn.Linear(2, 1))

def theirs():
    return keras.Sequential([keras.Input((2,)), kl.Dense(1)])
"""
TORCH, KERAS = ("--torch", "code_in_files_models:ours"), ("--keras", "code_in_files_models:theirs")


class Running:
    """Its pickle makes a directory `ran` when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "code_in_files_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "a.safetensors").exists()


def refused(capsys, *arguments):
    assert main(["convert", *arguments]) == 1
    return capsys.readouterr().err


def save_with_lambda(path, **compiled):
    """Save a model with a layer that makes a directory `ran` whenever it is called, and when it is built."""
    model = keras.Sequential(
        [keras.Input((2,)), kl.Dense(1), kl.Lambda(lambda x: os.makedirs("ran", exist_ok=True) or x)]
    )
    if compiled:
        model.compile(**compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(path)
    Path("ran").rmdir()


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_by_pytorchs_weights_only(suffix, legacy, folder, capsys):
    state = {**nn.Linear(2, 1).state_dict(), "extra": Running()}
    torch.save(state, folder / f"weights.{suffix}", _use_new_zipfile_serialization=not legacy)
    told = refused(capsys, f"weights.{suffix}", "a.safetensors", *TORCH)
    assert "is no file of PyTorch with tensors alone" in told
    assert "mkdir" in told, "the reason: the function that is not admitted"


def test_a_state_dict_that_runs_code_is_refused_before_it_reaches_load_state_dict(folder):
    torch.save({"slowmo": Running()}, folder / "state.pt")
    with pytest.raises(Exception, match="mkdir"):
        torch.load(folder / "state.pt", weights_only=True)


def test_pickled_arrays_are_refused(folder, capsys):
    np.savez(folder / "weights.npz", weight=np.array([Running()], dtype=object))
    assert "is no checkpoint of hvd-slowmo" in refused(capsys, "weights.npz", "a.safetensors", *TORCH)
    keras.Sequential([keras.Input((2,)), kl.Dense(1)]).save(folder / "model.keras")
    with zipfile.ZipFile(folder / "model.keras") as whole, zipfile.ZipFile(folder / "other.keras", "w") as other:
        for name in ("config.json", "metadata.json"):
            other.writestr(name, whole.read(name))
        other.write(folder / "weights.npz", "model.weights.npz")
    assert "is no array without pickled objects" in refused(capsys, "other.keras", "a.safetensors", *KERAS)


def test_a_lambda_layer_is_refused_and_its_code_does_not_run(folder, capsys):
    save_with_lambda(folder / "model.keras")
    told = refused(capsys, "model.keras", "a.safetensors", *KERAS)
    assert "has a Lambda, which is Python code, and Keras' safe mode loads none from a file" in told


def test_a_model_file_with_a_lambda_beside_slowmo_is_refused_by_keras_safe_mode(folder):
    optimizer = KerasSlowMo(keras.optimizers.SGD(0.1), SlowMoConfig(tau=2))
    save_with_lambda(folder / "model.keras", optimizer=optimizer, loss="mse")
    with pytest.raises(ValueError, match=r"safe_mode|unsafe"):
        keras.models.load_model(folder / "model.keras")


def test_a_lambda_within_slowmos_own_config_is_refused_with_the_reason(folder):
    config = KerasSlowMo(keras.optimizers.SGD(0.1), SlowMoConfig(tau=2)).get_config()
    with pytest.warns(UserWarning, match="includes a `lambda`"):
        stored = keras.saving.serialize_keras_object(lambda x: os.mkdir("ran"))
    assert stored["class_name"] == "__lambda__"
    config["inner_optimizer"]["config"]["learning_rate"] = json.loads(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"safe_mode|unsafe"):
        KerasSlowMo.from_config(config)
    config["inner_optimizer"] = json.loads(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"safe_mode|unsafe"):
        KerasSlowMo.from_config(config)
