"""Options, images and schedule of the ImageNet examples, independent of the framework.

The recipe is the paper's: 8,192 images a batch over all workers, 90 epochs, a tenth of the learning rate after 30, 60
and 80, averaged gradients within each machine. With another number of epochs, the decays scale. The warm-up of 5
epochs, the highest rate of 0.1 per 256 images, and the crops follow Goyal et al. (arXiv 1706.02677).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import comparison
import numpy as np
from schedules import step_decay

from hvd_slowmo import SlowMoConfig

try:
    from PIL import Image
except ModuleNotFoundError:
    sys.exit("This example reads images with Pillow. Run: pip install Pillow")

METHODS = ("slowmo",)
WARMUP, DECAYS = 5 / 90, (30 / 90, 60 / 90, 80 / 90)  # shares of the run
ENDINGS = (".jpeg", ".jpg", ".png")
MEAN, DEVIATION = (np.array(values, np.float32) for values in ((124, 116, 104), (58, 57, 57)))
"""About those of ImageNet's pixels, by channel; the first BatchNorm takes care of the rest."""


def parse(
    description: str | None,
    rank: int = 0,
    arguments: Sequence[str] | None = None,
    more: Callable[[comparison.Add], object] = lambda add: None,
) -> Namespace:
    """Parse the options, and `more` of a single example. Only rank 0 prints the help."""
    parser = comparison.make_parser(description)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="directory with train/CLASS/*.jpg and val/CLASS/*.jpg")
    comparison.add_method_options(add, methods=METHODS, seeds=1, inner_state="reset")
    add("--gradients", choices=("local", "node"), default="node", help="node: average them within each machine")
    add("--epochs", type=int, default=90, help="passes over the training data, all workers together")
    add("--batch-size", type=int, default=8192, help="images per step, all workers together")
    add("--lr", type=float, help="highest learning rate, after the warm-up; by default 0.1 per 256 images a batch")
    add("--weight-decay", type=float, default=1e-4, help="weight decay of the inner optimizer")
    add("--size", type=int, default=224, help="height and width of the crops, in pixels")
    add("--width", type=int, default=64, help="channels of the first stage; ResNet-50 has 64")
    add("--precision", choices=("float32", "bfloat16", "float16"), default="float32", help="of the computation")
    add("--readers", type=int, default=4, help="processes or threads per worker that read images")
    add("--statistics", type=int, default=50, help="batches per worker for BatchNorm's statistics in an evaluation")
    comparison.add_resume_options(add)
    more(add)
    args = comparison.parse(parser, rank, arguments)
    if args.lr is None:
        args.lr = 0.1 * args.batch_size / 256
    return args


def configure(args: Namespace, method: str) -> SlowMoConfig:
    """Return the configuration of a method; gradients are averaged within each machine where the options say so."""
    config = comparison.METHODS[method](args)
    return dataclasses.replace(config, gradients=args.gradients) if config.gradients == "local" else config


def learning_rate(step: int, total: int, args: Namespace) -> float:
    """Return the learning rate of a step."""
    return args.lr * step_decay(step, total, WARMUP, DECAYS)


@dataclasses.dataclass(frozen=True)
class Images:
    """Files and classes of a directory that has one of its own for each class.

    Args:
        paths: of the files, in the order of their names.
        classes: their numbers, in the order of the names of the directories.
    """

    paths: Sequence[Path]
    classes: np.ndarray

    @property
    def count(self) -> int:
        """The number of classes."""
        return int(self.classes.max()) + 1


def load(args: Namespace) -> tuple[Images, Images]:
    """List the images to train on and those for the test."""
    train, test = (args.data / name for name in ("train", "val"))
    names = {
        path: sorted(each.name for each in path.iterdir() if each.is_dir()) if path.is_dir() else []
        for path in (train, test)
    }
    if not names[train] or names[train] != names[test]:
        sys.exit(
            f"{args.data} must have the directories train and val, each with one directory per class that holds its "
            f"images, such as {train / 'n01440764' / 'n01440764_10026.JPEG'}. Found {len(names[train])} classes in "
            f"train and {len(names[test])} in val. ImageNet comes from https://image-net.org after a registration; its "
            "validation images have to be sorted into directories by class."
        )
    return list_images(train, names[train]), list_images(test, names[train])


def list_images(folder: Path, names: Sequence[str]) -> Images:
    """List the images of each class."""
    found = [
        (path, number)
        for number, name in enumerate(names)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in ENDINGS
    ]
    if not found:
        sys.exit(f"{folder} has no images. Their names must end in {', '.join(ENDINGS)}.")
    paths, classes = zip(*found, strict=True)
    return Images(paths, np.array(classes, np.int64))


def random_crop(path: Path, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a part of an image, a twelfth to all of it, flipped in half of the cases: (size, size, 3), float32."""
    with Image.open(path) as image:
        width, height = image.size
        for _ in range(10):
            area = width * height * rng.uniform(0.08, 1)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                break
        else:
            w = h = min(width, height)
        left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        pixels = scaled(image, (left, top, left + w, top + h), size)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def middle_crop(path: Path, size: int) -> np.ndarray:
    """Return the middle of an image, seven eighths of its shorter side: (size, size, 3), float32."""
    with Image.open(path) as image:
        width, height = image.size
        side = 7 / 8 * min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return scaled(image, (left, top, left + side, top + side), size)


def scaled(image: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """Return a part of an image in another size, normalized."""
    part = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box)
    return (np.asarray(part, np.float32) - MEAN) / DEVIATION


def report(name: str, args: Namespace, runs: Sequence[comparison.Run], workers: int) -> None:
    """Print the table, and write the results and the figure."""
    comparison.report(f"imagenet_{name}", args, runs, workers, task=f"{args.data.name}, ResNet-50")
