"""`hvd-slowmo map`."""

import pytest

from hvd_slowmo.cli.main import main

pytestmark = pytest.mark.usefixtures("float64")

MODULE = """
import torch, keras
from torch import nn

def ours():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))

def theirs(activation="relu", units=3):
    layers = keras.layers
    return keras.Sequential([keras.Input((6, 6, 1)), layers.Conv2D(2, 3, activation=activation, name="conv"),
                             layers.Flatten(), layers.Dense(units, name="out")], name="net")

def other():
    return theirs("tanh")

def wider():
    return theirs(units=4)

def broken():
    return 1 / 0

def tokens():
    return nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 3))

def tokens_keras():
    return keras.Sequential([keras.Input((None,)), keras.layers.Embedding(5, 2), keras.layers.Dense(3)])
"""


@pytest.mark.slow
def test_the_command_prints_the_map_and_how_far_the_models_are_apart(tmp_path, monkeypatch, capsys):
    import keras  # after PyTorch, which `float64` imports: the other way round its libraries may not load

    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    (tmp_path / "map_command_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)

    def run(ours, theirs, *options):
        status = main(["map", f"map_command_models:{ours}", f"map_command_models:{theirs}", *options])
        return status, *capsys.readouterr()

    status, out, error = run("ours", "theirs")
    assert status == 0, out + error
    assert "The models compute the same." in out
    lines = [line.split() for line in out.splitlines()]
    assert ["0.conv.weight", "parameter", "2x1x3x3", "0.weight", "2x1x3x3", "net/conv/kernel", "3x3x1x2", "axes",
            "3", "2", "0", "1"] in lines  # fmt: skip
    assert ["1.linear.weight", "parameter", "3x32", "3.weight", "3x32", "net/out/kernel", "32x3", "as", "4x4x2x3",
            "axes", "3", "2", "0", "1"] in lines  # fmt: skip
    status, out, _ = run("ours", "other")
    assert status == 1
    assert "The outputs differ by more than rounding." in out
    for arguments, message in {
        ("theirs", "theirs"): "map_command_models:theirs must return a PyTorch model. Received: keras.",
        ("ours", "ours"): "map_command_models:ours must return a Keras model. Received: torch.",
        ("broken", "theirs"): "map_command_models:broken has raised ZeroDivisionError",
    }.items():
        status, _, error = run(*arguments)
        assert status == 1
        assert message in error
        assert error.count("\n") == 1
    status, _, error = run("ours", "wider")
    assert status == 1
    assert error.startswith("hvd-slowmo map: 1.linear.weight (3.weight and net/out/kernel) has shape")
    status, _, error = run("tokens", "tokens_keras")
    assert status == 1
    assert "Give it: --input" in error
    status, out, error = run("tokens", "tokens_keras", "--input", "6")
    assert status == 0, out + error
    status, _, error = run("our", "theirs")
    assert status == 1
    assert "has no our. Nearest: ours" in error
    assert main(["map", "nowhere:f", "nowhere:g"]) == 1
    assert "there is no module nowhere" in capsys.readouterr().err
    assert main(["map", "nowhere", "nowhere:g"]) == 1
    assert "give module:function" in capsys.readouterr().err
