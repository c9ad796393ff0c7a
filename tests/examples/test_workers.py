"""The examples with a task as jobs of two workers, on tiny data in the published forms."""

import re

import pytest
import test_imagenet as imagenet
from running import EXAMPLES, PNG, horovodrun, torchrun
from test_images import options, write_binary
from test_translation import small, write_lines

pytestmark = [pytest.mark.slow, pytest.mark.workers]

LAUNCHERS = {"horovodrun": horovodrun, "torchrun": torchrun}


def check(output, folder):
    """Check that the output ends with the table, and that progress came as lines."""
    assert re.search(r"slowmo +\d+\.\d +\d+\.\d\d +\d+\.\d\d$", output, re.MULTILINE), output
    assert "\r" not in output
    # The first step tells nothing of the time left: it has waited for imports and traces.
    assert re.search(r"slowmo, seed 0: 1 of \d+ steps, \d+ %$", output, re.MULTILINE)
    assert [path.read_bytes()[:8] for path in folder.glob("*.png")] == [PNG]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        ("cifar10_torch", "torchrun"),
        ("cifar10_torch", "horovodrun"),
        ("cifar10_keras", "horovodrun"),
    ],
)
def test_images_on_two_workers(name, launcher, tmp_path):
    write_binary(tmp_path)
    out, checkpoints = tmp_path / "out", ("--checkpoints", tmp_path / "checkpoints")
    script = EXAMPLES / f"{name}.py"
    check(LAUNCHERS[launcher](2, script, *options(tmp_path, out), *checkpoints), out)


@pytest.mark.thorough
def test_translation_on_two_workers(tmp_path):
    out = tmp_path / "out"
    check(horovodrun(2, EXAMPLES / "translation_torch.py", *small(write_lines(tmp_path), out)), out)


@pytest.mark.thorough
def test_a_directory_of_images_on_a_node_of_two_workers(tmp_path):
    imagenet.write_images(tmp_path, 12)
    more = ("--width", "4", "--checkpoints", tmp_path / "checkpoints", "--save-every", "2")
    check(torchrun(2, EXAMPLES / "imagenet_torch.py", *imagenet.options(tmp_path, *more)), tmp_path / "out")
