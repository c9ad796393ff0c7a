"""The ImageNet examples: a directory of images, the crops, and a resume within an epoch."""

import numpy as np
import pytest
from running import run, run_and_stop

Image = pytest.importorskip("PIL.Image")

import imagenet_common as common  # noqa: E402 - it needs Pillow

COLOURS = {"n01": (200, 40, 40), "n02": (40, 200, 40), "n03": (40, 40, 200)}


def write_images(folder, count):
    """Write JPEG files in the form of ImageNet: per class a colour, with noise."""
    rng = np.random.default_rng(0)
    for part, number in (("train", count), ("val", 2)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for index in range(number):
                pixels = np.clip(rng.normal(colour, 20, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{name}_{index}.JPEG")


def test_files_and_classes_are_listed_in_order(tmp_path):
    write_images(tmp_path, 3)
    (tmp_path / "train" / "n01" / "notes.txt").write_text("no image")
    train, test = common.load(common.parse(None, arguments=["--data", str(tmp_path)]))
    assert train.classes.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [path.name for path in test.paths] == [f"{name}_{i}.JPEG" for name in COLOURS for i in range(2)]
    assert train.count == 3


def test_a_missing_directory_says_where_imagenet_comes_from(tmp_path):
    args = common.parse(None, arguments=["--data", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"directories train and val, each with one directory per class") as error:
        common.load(args)
    assert "Found 0 classes in train and 0 in val" in str(error.value)
    assert "https://image-net.org" in str(error.value)
    (tmp_path / "train" / "n01").mkdir(parents=True)
    (tmp_path / "val" / "n01").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"train has no images\. Their names must end in \.jpeg, \.jpg, \.png"):
        common.load(args)


@pytest.fixture
def gradient(tmp_path):
    """The value of a pixel is its column, doubled; the image is wide."""
    row = np.arange(120, dtype=np.uint8) * 2
    Image.fromarray(np.broadcast_to(row[None, :, None], (60, 120, 3)).copy()).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def values(pixels):
    """Return the values before the normalization, of the first channel's first row."""
    return (pixels * common.DEVIATION + common.MEAN)[0, :, 0]


def test_the_middle_is_seven_eighths_of_the_shorter_side(gradient):
    row = values(common.middle_crop(gradient, 21))
    assert row.shape == (21,)
    assert row[10] == pytest.approx(119, abs=1)
    assert row[-1] - row[0] == pytest.approx(2 * 52.5 * 20 / 21, abs=2)


def test_crops_vary_in_place_size_and_direction(gradient):
    rows = np.array([values(common.random_crop(gradient, 8, np.random.default_rng(n))) for n in range(60)])
    assert rows.min() >= 0
    assert rows.max() <= 238
    rising = rows[:, -1] > rows[:, 0]
    assert 15 < rising.sum() < 45
    width = np.abs(rows[:, -1] - rows[:, 0])
    assert width.max() > 120
    assert width.min() < 60


def test_gradients_are_averaged_within_machines_except_for_ar_sgd():
    args = common.parse(None, arguments=[])
    assert (args.batch_size, args.epochs, args.lr) == (8192, 90, 3.2)
    assert [common.configure(args, method).gradients for method in ("slowmo", "local-sgd", "ar-sgd")] == [
        "node",
        "node",
        "all",
    ]


def test_the_schedule_is_the_papers():
    args = common.parse(None, arguments=["--lr", "1"])
    rates = [common.learning_rate(step, 900, args) for step in range(900)]
    assert rates[0] == pytest.approx(0.02)
    assert [round(rates[step], 4) for step in (49, 299, 300, 599, 600, 799, 800, 899)] == [
        1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001,
    ]  # fmt: skip


def options(folder, *more):
    small = ["--data", folder, "--out", folder / "out", "--size", "32", "--batch-size", "6", "--lr", "0.02"]
    return [*small, "--tau", "2", "--epochs", "2", "--statistics", "1", "--readers", "0", *more]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.thorough)])
def test_pytorch_resumes_within_an_epoch_with_the_same_result(precision, tmp_path, monkeypatch, capsys):
    import imagenet_torch

    write_images(tmp_path, 12)
    small = [*options(tmp_path), "--width", "4", "--precision", precision]
    wanted, steps = run(imagenet_torch, monkeypatch, capsys, *small)
    assert (wanted[0]["steps"], steps) == ([6, 12], 12)
    small += ["--checkpoints", tmp_path / "checkpoints", "--save-every", "2"]
    run_and_stop(imagenet_torch, monkeypatch, capsys, *small, after=11)
    found, left = run(imagenet_torch, monkeypatch, capsys, *small)
    assert found == wanted
    assert left in (4, 2)  # the save of step 10 may not be whole
    assert run(imagenet_torch, monkeypatch, capsys, *small) == (wanted, 0)


@pytest.mark.slow
@pytest.mark.thorough
def test_keras_resumes_after_an_epoch_with_the_same_result(tmp_path, monkeypatch, capsys):
    module = pytest.importorskip("imagenet_keras")
    monkeypatch.setattr(module, "choose_device", lambda: None)  # it is set once in a process
    write_images(tmp_path, 4)
    small = options(tmp_path)
    wanted, steps = run(module, monkeypatch, capsys, *small)
    assert (wanted[0]["steps"], steps) == ([2, 4], 4)
    small += ["--checkpoints", tmp_path / "checkpoints"]
    run_and_stop(module, monkeypatch, capsys, *small, after=3)
    assert run(module, monkeypatch, capsys, *small) == (wanted, 2)
