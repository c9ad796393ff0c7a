"""`hvd-slowmo inspect` and `hvd-slowmo convert`."""

import errno
import resource
import weakref

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_model as load_torch_model
from safetensors.torch import save_file as save_torch_file
from safetensors.torch import save_model as save_torch_model
from torch import nn

# isort: split
# PyTorch comes first: the other way round its libraries may not load.
import keras
from keras import layers as kl

from hvd_slowmo.checkpoint import file as safefile
from hvd_slowmo.checkpoint import job as snapshot
from hvd_slowmo.checkpoint.facts import WorkerFacts
from hvd_slowmo.cli.main import main
from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.torch import SlowMo, SlowMoConfig
from support.checkpoints import RESET, damaged, files, saved
from support.sample import of_all
from support.trainings.pytorch import same

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

def half():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).bfloat16()

def theirs_half():
    layers = [kl.Dense(3, dtype="bfloat16"), kl.Dense(2, dtype="bfloat16")]
    return keras.Sequential([keras.Input((2,), dtype="bfloat16"), *layers])

def tied():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3, bias=False))
    model[1].weight = model[0].weight
    return model

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
    optimizer = SlowMo(base, model, SlowMoConfig(tau=2), comm=SoloComm())
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


@pytest.mark.slow
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

    from hvd_slowmo.tf import SlowMo as KerasSlowMo

    convert("weights.pt", "start.slowmo", *TORCH)
    convert("start.slowmo", "again.keras", *KERAS)
    convert("again.keras", "other.slowmo", *KERAS)
    assert files(folder / "start.slowmo") == files(folder / "other.slowmo")
    assert main(["inspect", "start.slowmo"]) == 0
    assert "weights alone" in capsys.readouterr().out
    model = ours()
    optimizer = SlowMo(torch.optim.Adam(model.parameters(), 0.125), model, SlowMoConfig(tau=2), comm=SoloComm())
    for _ in range(3):
        optimizer.step()
    optimizer.load("start.slowmo")
    assert optimizer.steps == 0
    assert not optimizer.inner_optimizer.state
    assert all(torch.equal(p, torch.load("weights.pt")[name]) for name, p in model.named_parameters())
    optimizer.save("a")
    keras_model = theirs()
    other = KerasSlowMo(keras.optimizers.Adam(0.125), SlowMoConfig(tau=2))
    other.load("start.slowmo", keras_model)
    other.save("b", keras_model)
    a, b = (safefile.read(folder / name) for name in "ab")
    assert a[0] == b[0]
    assert same(*({k: x for k, x in each[1].items() if "framework/" not in k} for each in (a, b)))
    assert same(a[1]["anchor/0.conv.weight"], a[1]["model/0.conv.weight"])


@pytest.mark.slow
def test_what_can_not_be_converted_is_said(folder, capsys):
    saved(folder / "own", 2, 3)
    torch.save({"a": 1}, folder / "no.pt")
    torch.save(nn.Linear(2, 2), folder / "code.pt")
    torch.save({0: torch.ones(1)}, folder / "numbers.pt")
    (folder / "damaged.pt").write_bytes(b"PK")
    for suffix in ("pt", "keras", "weights.h5", "safetensors"):
        (folder / f"empty.{suffix}").touch()
        (folder / f"text.{suffix}").write_text("weights")
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
        ("numbers.pt", "a.safetensors", *TORCH): "numbers.pt is no state_dict of a model",
        **{
            (f"{what}.{suffix}", "a.safetensors", *TORCH, *KERAS): f"{what}.{suffix} {message}"
            for what in ("empty", "text")
            for suffix, message in {
                "pt": "is no file of PyTorch",
                "keras": "does not fill the Keras model",
                "weights.h5": "does not fill the Keras model",
                "safetensors": "is no checkpoint of hvd-slowmo, or it is damaged",
            }.items()
        },
        ("own", "a.safetensors"): "holds no parameters that all workers share",
        ("weights.pt", "a.keras", "--torch", "convert_command_models:other", *KERAS): "has no partner",
    }.items():
        assert main(["convert", *arguments]) == 1, arguments
        assert message in capsys.readouterr().err, arguments
    assert not [file for file in folder.iterdir() if file.name.endswith(("a.pt", "a.keras", "a.safetensors"))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_damaged_sources_are_one_error_each(folder, capsys):
    """Or are converted where the format has no checksum of what was hit."""
    convert("weights.pt", "whole.safetensors", *TORCH)
    convert("weights.pt", "whole.keras", *TORCH, *KERAS)
    convert("weights.pt", "whole.weights.h5", *TORCH, *KERAS)
    (folder / "whole.pt").write_bytes((folder / "weights.pt").read_bytes())
    (folder / "whole.slowmo").write_bytes((folder / "checkpoint").read_bytes())
    rng = np.random.default_rng(0)
    refused = dict.fromkeys(("pt", "keras", "weights.h5", "safetensors", "slowmo"), 0)
    each = of_all(24, few=8)
    capsys.readouterr()
    for suffix, _ in [(suffix, number) for suffix in refused for number in range(each)]:
        source = folder / f"damaged.{suffix}"
        source.write_bytes((folder / f"whole.{suffix}").read_bytes())
        kind = damaged([source], rng)
        status = main(["convert", source.name, "a.safetensors", *TORCH, *KERAS])
        told = capsys.readouterr().err
        assert status == (1 if "hvd-slowmo convert: " in told else 0)
        assert "Traceback" not in told
        assert (folder / "a.safetensors").is_file() == (status == 0)
        assert status or suffix != "slowmo" or kind == "swap", "a checkpoint has checksums of all that it holds"
        refused[suffix] += status
        (folder / "a.safetensors").unlink(missing_ok=True)
    assert min(refused.values()) >= each // 4


def test_a_file_from_a_gpu_is_read_without_one(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(torch.load("weights.pt"), folder / "gpu.pt")
    convert("gpu.pt", "a.safetensors", *TORCH)
    convert("weights.pt", "b.safetensors", *TORCH)
    assert same(load_file("a.safetensors"), load_file("b.safetensors"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_bfloat16_goes_around_all_formats_to_the_bit(folder):
    """As float32, which NumPy has; weights are published as safetensors in bfloat16."""
    from convert_command_models import half, theirs_half

    from hvd_slowmo.tf import SlowMo as KerasSlowMo

    torch.manual_seed(1)
    expected = half().state_dict()
    save_torch_file(expected, folder / "published.safetensors")
    options = ("--torch", "convert_command_models:half", "--keras", "convert_command_models:theirs_half")
    convert("published.safetensors", "a.keras", *options)
    convert("a.keras", "b.slowmo", *options[2:])
    convert("a.keras", "c.pt", *options)
    convert("a.keras", "d.safetensors", *options[2:])
    convert("d.safetensors", "e.pt", *options)
    convert("b.slowmo", "f.weights.h5", *options[2:])
    convert("f.weights.h5", "g.safetensors", *options)
    for name in ("c.pt", "e.pt"):
        assert same(torch.load(name), expected)
    assert all(x.dtype == np.float32 for x in load_file("g.safetensors").values())
    assert same(load_file("g.safetensors"), {name: x.float().numpy() for name, x in expected.items()})
    ours, theirs = half(), theirs_half()
    optimizer = SlowMo(torch.optim.SGD(ours.parameters(), 0.125), ours, SlowMoConfig(tau=2), comm=SoloComm())
    optimizer.load("b.slowmo")
    assert same(dict(ours.state_dict()), expected)
    KerasSlowMo(keras.optimizers.SGD(0.125), SlowMoConfig(tau=2)).load("b.slowmo", theirs)
    np.testing.assert_array_equal(theirs.layers[0].kernel.numpy().T, expected["0.weight"].float().numpy())


def test_plain_weights_of_another_precision_begin_a_training(folder):
    from convert_command_models import other

    model = other()
    names = {"0.weight": "0.linear.weight", "0.bias": "0.linear.bias"}  # on the wire
    save_torch_file({names[key]: x.half() for key, x in model.state_dict().items()}, folder / "half.safetensors")
    convert("half.safetensors", "start.slowmo", "--torch", "convert_command_models:other")
    optimizer = SlowMo(torch.optim.SGD(model.parameters(), 0.1), model, SlowMoConfig(tau=2), comm=SoloComm())
    optimizer.load("start.slowmo")


def test_inspect_shows_what_is_there(folder, capsys):
    assert main(["inspect", "checkpoint"]) == 0
    told = capsys.readouterr().out
    assert "checkpoint: 1 worker at step 3 (1 of 2 in its block), inner optimizer sgd" in told
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
    assert "Resumes on 2 workers only: each has its own parameters and statistics, inner optimizer state." in told
    (first, *_) = sorted(folder.glob("own.rank*"))
    assert main(["inspect", first.name]) == 0
    assert "the file of rank 0 of 2 alone" in capsys.readouterr().out
    first.unlink()
    assert main(["inspect", "own"]) == 1
    assert "is missing: it belongs to own" in capsys.readouterr().err
    (folder / "checkpoint").write_bytes((folder / "checkpoint").read_bytes()[:-1])
    assert main(["inspect", "checkpoint"]) == 1
    assert "damaged" in capsys.readouterr().err


def test_inspect_holds_one_files_arrays_at_a_time(folder, monkeypatch):
    saved(folder / "own", 2, 3)
    held = []

    def watched(real):
        def read(path, *arguments):
            assert not [each for each in held if each() is not None]
            found = real(path, *arguments)
            arrays = found if isinstance(found, dict) else found[1]
            held.extend(weakref.ref(value) for value in arrays.values())
            return found

        return read

    monkeypatch.setattr(snapshot, "read_worker", watched(snapshot.read_worker))
    monkeypatch.setattr(safefile, "read", watched(safefile.read))
    assert main(["inspect", "own"]) == 0
    assert len(held) > 8


def test_a_training_or_the_source_is_never_replaced(folder, capsys):
    saved(folder / "own", 2, 3)
    (part, *_) = sorted(folder.glob("own.rank*"))
    part.rename(folder / "part.safetensors")
    (folder / "other.slowmo").write_bytes((folder / "checkpoint").read_bytes())
    (folder / "link.slowmo").symlink_to("other.slowmo")
    before = files(folder / "other.slowmo")
    for source, target, message in (
        ("other.slowmo", "other.slowmo", "is the source itself"),
        ("other.slowmo", "link.slowmo", "is the source itself"),
        ("weights.pt", "weights.pt", "is the source itself"),
        ("weights.pt", "other.slowmo", "is the checkpoint of a training"),
        ("weights.pt", "part.safetensors", "is the checkpoint of a training"),
    ):
        assert main(["convert", source, target, *TORCH]) == 1
        assert message in capsys.readouterr().err
    assert files(folder / "other.slowmo") == before
    convert("weights.pt", "start.slowmo", *TORCH)
    convert("weights.pt", "start.slowmo", *TORCH)


def test_plain_weights_and_tied_ones_are_what_other_loaders_take(folder):
    from convert_command_models import tied

    options = ("--torch", "convert_command_models:tied")
    torch.manual_seed(1)
    expected = tied()
    save_torch_model(expected, folder / "published.safetensors")
    convert("published.safetensors", "a.pt", *options)
    convert("a.pt", "b.safetensors", *options)
    convert("b.safetensors", "c.slowmo", *options)
    convert("c.slowmo", "d.safetensors", *options)
    both = {name: x.clone() for name, x in expected.state_dict().items()}
    save_torch_file(both, folder / "both.safetensors")
    convert("both.safetensors", "e.safetensors", *options)
    assert same(torch.load("a.pt"), dict(expected.state_dict()))
    for name in ("b", "d", "e"):
        with safe_open(folder / f"{name}.safetensors", framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
        model = tied()
        assert load_torch_model(model, folder / f"{name}.safetensors") == (set(), [])
        assert same(dict(model.state_dict()), dict(expected.state_dict()))


def test_a_full_disk_is_an_os_error_and_the_old_file_stays(tmp_path):
    path = tmp_path / "weights.safetensors"
    safefile.write_plain(path, {"x": np.ones(2)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        for write in (
            safefile.write_plain,
            lambda path, arrays: safefile.write(path, WorkerFacts(rank=0, workers=1), arrays),
        ):
            with pytest.raises(OSError, match="File too large") as caught:
                write(path, {"x": np.ones(100_000)})
            assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert safefile.read_plain(path)["x"].tolist() == [1.0, 1.0]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
