"""`hvd-slowmo inspect` and `hvd-slowmo convert`."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_snapshot import RESET, saved
from torch import nn
from torch_training import same

# isort: split
# PyTorch comes first: the other way round its libraries may not load.
import keras
from keras import layers as kl

from hvd_slowmo import safefile
from hvd_slowmo.cli import main
from hvd_slowmo.comm import SoloComm
from hvd_slowmo.torch import SlowMo, SlowMoConfig

MODELS = """
import torch
from torch import nn
import keras
from keras import layers as kl
from hvd_slowmo import ParameterMap

def ours():
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))

def theirs():
    layers = [kl.Conv2D(3, 2), kl.BatchNormalization(epsilon=1e-5), kl.Flatten(), kl.Dense(4)]
    return keras.Sequential([keras.Input((3, 3, 2)), *layers])

def other():
    return nn.Sequential(nn.Linear(2, 3))

same = ParameterMap()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With a module of two models, and a checkpoint."""
    (tmp_path / "convert_command_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SlowMo.over(SoloComm(), base, model, SlowMoConfig(tau=2))
    for _ in range(3):
        model(torch.randn(5, 2, 3, 3)).square().mean().backward()
        optimizer.step()
    optimizer.save(tmp_path / "checkpoint")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return tmp_path


TORCH = ("--torch", "convert_command_models:ours")
KERAS = ("--keras", "convert_command_models:theirs")


def convert(source, target, *options):
    assert main(["convert", source, target, *options]) == 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own, in saving
def test_weights_go_around_all_formats_to_the_bit(folder, capsys):
    convert("checkpoint", "a.pt", *TORCH)
    convert("a.pt", "b.keras", *TORCH, *KERAS, "--map", "convert_command_models:same")
    convert("b.keras", "c.safetensors", *KERAS)
    convert("c.safetensors", "d.weights.h5", *KERAS)
    convert("d.weights.h5", "e.safetensors", *KERAS, *TORCH)
    convert("e.safetensors", "f.pth", *TORCH)
    convert("checkpoint", "g.safetensors")
    assert capsys.readouterr().out.splitlines()[-1] == "g.safetensors: 8 tensors"
    expected = torch.load("weights.pt")
    for name in ("a.pt", "f.pth"):
        found = torch.load(name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], x) for key, x in expected.items() if key != "1.num_batches_tracked")
    assert same(load_file("c.safetensors"), load_file("g.safetensors"))
    assert set(load_file("e.safetensors")) == set(expected)
    model = keras.models.load_model("b.keras")
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 2)).astype("float32")
    ours = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).eval()
    ours.load_state_dict(expected)
    theirs = ours(torch.tensor(x).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(model.predict(x, verbose=0), theirs, atol=1e-5)
    assert isinstance(model.layers[0], kl.Conv2D)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_training_begins_with_weights(folder, capsys):
    from convert_command_models import ours, theirs
    from test_snapshot_frameworks import files

    from hvd_slowmo.tf import SlowMo as KerasSlowMo

    convert("weights.pt", "start.slowmo", *TORCH)
    convert("start.slowmo", "again.keras", *KERAS)
    convert("again.keras", "other.slowmo", *KERAS)
    assert files(folder / "start.slowmo") == files(folder / "other.slowmo")
    assert main(["inspect", "start.slowmo"]) == 0
    assert "weights alone" in capsys.readouterr().out
    model = ours()
    optimizer = SlowMo.over(SoloComm(), torch.optim.Adam(model.parameters(), 0.125), model, SlowMoConfig(tau=2))
    for _ in range(3):
        optimizer.step()
    optimizer.load("start.slowmo")
    assert optimizer.steps == 0
    assert not optimizer.base.state
    assert all(torch.equal(p, torch.load("weights.pt")[name]) for name, p in model.named_parameters())
    optimizer.save("a")
    keras_model = theirs()
    other = KerasSlowMo(keras.optimizers.Adam(0.125), SlowMoConfig(tau=2))
    other.load("start.slowmo", keras_model)
    other.save("b", keras_model)
    a, b = (safefile.read(folder / name) for name in "ab")
    assert a[0] == b[0]
    assert same({k: x for k, x in a[1].items() if "rest/" not in k}, b[1])
    assert same(a[1]["anchor/0.conv.weight"], a[1]["model/0.conv.weight"])


def test_what_can_not_be_converted_is_said(folder, capsys):
    saved(folder / "own", 2, 3)
    torch.save({"a": 1}, folder / "no.pt")
    torch.save(nn.Linear(2, 2), folder / "code.pt")
    (folder / "damaged.pt").write_bytes(b"PK")
    for arguments, message in {
        ("nothing", "a.pt"): "there is no file nothing",
        ("checkpoint", "a.pt"): "a.pt needs the model: give --torch MODULE:FUNCTION",
        ("checkpoint", "a.keras"): "a.keras needs the model: give --keras",
        ("checkpoint", "a.txt"): "the suffix of a.txt must be one of .pt",
        ("checkpoint", "a.pt", "--torch", "convert_command_models:other"): "the checkpoint is of another model",
        ("checkpoint", "a.pt", "--torch", "convert_command_models:others"): "has no others. Nearest: other",
        ("weights.pt", "a.safetensors", "--torch", "convert_command_models:other"): "weights.pt is of another model",
        ("no.pt", "a.safetensors", *TORCH): "no.pt is no state_dict of a model",
        ("code.pt", "a.safetensors", *TORCH): "code.pt is no file of PyTorch with tensors alone",
        ("damaged.pt", "a.safetensors", *TORCH): "damaged.pt is no file of PyTorch",
        ("own", "a.safetensors"): "holds no parameters that all workers share",
        ("weights.pt", "a.keras", "--torch", "convert_command_models:other", *KERAS): "has no partner",
    }.items():
        assert main(["convert", *arguments]) == 1, arguments
        assert message in capsys.readouterr().err, arguments
    assert not [file for file in folder.iterdir() if file.name.endswith(("a.pt", "a.keras", "a.safetensors"))]


def test_inspect_shows_what_is_there(folder, capsys):
    assert main(["inspect", "checkpoint"]) == 0
    told = capsys.readouterr().out
    assert "checkpoint: 1 worker at step 3 (1 of 2 in its block), base optimizer sgd" in told
    assert "model/0.conv.weight" in told
    assert "float32  3x2x2x2" in told
    assert "tau           2" in told
    assert "Resumes on any number of workers." in told
    saved(folder / "own", 2, 3, RESET)
    assert main(["inspect", "own"]) == 0
    told = capsys.readouterr().out
    assert "by names that only torch has" in told
    assert "rank 1" in told
    assert "own.rank0-" in told
    assert (
        "Resumes on 2 workers only: each has its own parameters and statistics, the base optimizer's buffers." in told
    )
    (first, *_) = sorted(folder.glob("own.rank*"))
    assert main(["inspect", first.name]) == 0
    assert "what rank 0 of 2 alone has" in capsys.readouterr().out
    first.unlink()
    assert main(["inspect", "own"]) == 1
    assert "is missing: it belongs to own" in capsys.readouterr().err
    (folder / "checkpoint").write_bytes((folder / "checkpoint").read_bytes()[:-1])
    assert main(["inspect", "checkpoint"]) == 1
    assert "damaged" in capsys.readouterr().err
