"""Files that a command must not replace, that others must be able to read, and arguments that no command can use."""

import errno

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from hvd_slowmo.checkpoint import file as safefile
from hvd_slowmo.cli.main import main
from hvd_slowmo.comm.protocol import SoloComm
from hvd_slowmo.comm.threads import ThreadWorld
from hvd_slowmo.torch import SlowMo

MODELS = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Linear(2, 3))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

def tied():
    return Tied()

def number():
    return 3
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "files_models.py").write_text(MODELS, "utf-8")
    monkeypatch.chdir(tmp_path)


def training(model, comm=None):
    return SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=comm or SoloComm(), tau=2)


def said(capsys, *arguments):
    assert main(list(arguments)) == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize("source", ["x.slowmo", "weights.pt"])
def test_the_checkpoint_of_a_training_is_not_replaced_by_weights(source, tmp_path, capsys):
    model = nn.Sequential(nn.Linear(2, 3))
    training(model).save("x.slowmo")
    torch.save(model.state_dict(), "weights.pt")
    before = (tmp_path / "x.slowmo").read_bytes()
    text = said(capsys, "convert", source, "x.slowmo", "--torch", "files_models:plain")
    assert "x.slowmo is the checkpoint of a training" in text
    assert (tmp_path / "x.slowmo").read_bytes() == before
    assert main(["convert", source, "new.slowmo", "--torch", "files_models:plain"]) == 0
    assert main(["convert", source, "new.slowmo", "--torch", "files_models:plain"]) == 0  # weights over weights


def test_weights_have_the_entry_that_hugging_face_asks_for():
    torch.save(nn.Sequential(nn.Linear(2, 3)).state_dict(), "weights.pt")
    assert main(["convert", "weights.pt", "weights.safetensors", "--torch", "files_models:plain"]) == 0
    with safe_open("weights.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_tied_weights_are_read_by_either_name_and_written_by_both():
    weight = torch.arange(20.0).reshape(5, 4)
    for name in ("embedding.weight", "head.weight"):
        torch.save({name: weight}, "one.pt")
        assert main(["convert", "one.pt", "both.safetensors", "--torch", "files_models:tied"]) == 0
        values = load_file("both.safetensors")
        assert values.keys() == {"embedding.weight", "head.weight"}
        assert all(torch.equal(value, weight) for value in values.values())
        assert main(["convert", "both.safetensors", "again.pt", "--torch", "files_models:tied"]) == 0
        assert torch.equal(torch.load("again.pt")["head.weight"], weight)


def test_a_full_disk_is_an_oserror(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safefile, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        safefile.write(tmp_path / "x", {}, {})
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left on device"):
        training(nn.Linear(2, 1)).save(tmp_path / "y")
    assert [file.name for file in tmp_path.iterdir()] == ["files_models.py"]


def test_another_directory_on_a_rank_is_refused_before_anything_is_written(tmp_path):
    for number in range(2):
        (tmp_path / str(number)).mkdir()

    def work(comm):
        optimizer = training(nn.Linear(2, 1), comm)
        with pytest.raises(ValueError, match="rank 1 differs from rank 0: path"):
            optimizer.save(tmp_path / str(comm.rank) / "x")

    ThreadWorld(2).run(work)
    assert not [file for number in range(2) for file in (tmp_path / str(number)).iterdir()]


def test_arguments_that_no_command_can_use_are_one_line(capsys):
    assert "must return a torch.nn.Module. It returned: int" in said(
        capsys, "map", "files_models:number", "files_models:plain"
    )
    assert "must return a keras.Model. It returned: Sequential" in said(
        capsys, "map", "files_models:plain", "files_models:plain"
    )
    assert "60000 workers take 27 GiB for each step" in said(capsys, "topology", "full", "-m", "60000")
