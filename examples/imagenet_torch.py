r"""SlowMo with ResNet-50 on ImageNet, as in the paper; with PyTorch. Any directory with a directory per class works.

Gradients are averaged among the GPUs of a machine, and SlowMo works between machines (--gradients node).

Run it with: torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST \
    examples/imagenet_torch.py --data DIRECTORY --precision bfloat16 --checkpoints DIRECTORY
Or over Horovod: hvd-slowmo run -np 32 -H HOST:8,... python examples/imagenet_torch.py ...
"""

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict

import comparison
import imagenet_common as common
import numpy as np
import torch
from epochs import Epochs
from progress import Progress
from resnet_torch import resnet50
from torch import nn
from torch.nn import functional as F
from torch_common import Mean, choose_device, logger

import hvd_slowmo.torch as slowmo

Batch = tuple[torch.Tensor, torch.Tensor]
Data = tuple[common.Images, common.Images]


class Files(torch.utils.data.Dataset):
    """Images by (epoch, number): a random crop that depends on seed, epoch and number; without an epoch the middle."""

    def __init__(self, images: common.Images, size: int, seed: int) -> None:
        self._images, self._size, self._seed = images, size, seed

    def __getitem__(self, key: tuple[int | None, int]) -> tuple[torch.Tensor, int]:
        epoch, number = key
        path, target = self._images.paths[number], int(self._images.classes[number])
        if epoch is None:
            pixels = common.middle_crop(path, self._size)
        else:
            pixels = common.random_crop(path, self._size, np.random.default_rng([self._seed, epoch, number]))
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), target


def batches(
    files: Files, epoch: int | None, numbers: list[np.ndarray], readers: int, device: torch.device
) -> Iterator[Batch]:
    """Yield images and classes on the device, read by other processes meanwhile."""
    keys = [[(epoch, int(number)) for number in batch] for batch in numbers]
    loader = torch.utils.data.DataLoader(
        files, batch_sampler=keys, num_workers=readers, pin_memory=device.type == "cuda"
    )
    for images, classes in loader:
        yield images.to(device, non_blocking=True), classes.to(device, non_blocking=True)


def train(
    args: Namespace, method: str, seed: int, data: Data, device: torch.device, progress: Progress
) -> comparison.Run:
    """Train one method with one seed, from the newest checkpoint if there is one."""
    train_images, test_images = data
    epochs = Epochs(len(train_images.paths), args.batch_size, seed, slowmo.rank(), slowmo.size())
    files, total = Files(train_images, args.size, seed), args.epochs * epochs.steps
    torch.manual_seed(seed)
    model = resnet50(train_images.count, args.width).to(device)
    mixed = args.precision != "float32"
    autocast = torch.autocast(device.type, getattr(torch, args.precision)) if mixed else nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "float16")
    inner = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
    optimizer = slowmo.SlowMo(inner, model, common.configure(args, method), metrics=args.logdir is not None)
    log = logger(args.logdir, f"{method}-{seed}")
    run, checkpoints, losses, sent = comparison.Run(method, seed), None, Mean(), 0
    if args.checkpoints is not None:
        checkpoints = slowmo.Checkpoints(args.checkpoints / f"{method}-{seed}", every=args.save_every)
        progress.skip(checkpoints.resume(optimizer, scaler=scaler, losses=losses))
        run = comparison.Run(**checkpoints.values.get("run", asdict(run)))
        sent = checkpoints.values.get("sent", 0)  # in an epoch that has been interrupted

    while optimizer.steps < total:
        epoch, first = divmod(optimizer.steps, epochs.steps)
        model.train()
        begin, before = time.perf_counter(), optimizer.bytes_sent - sent
        for images, classes in batches(files, epoch, epochs.batches(epoch, first), args.readers, device):
            for group in optimizer.param_groups:
                group["lr"] = common.learning_rate(optimizer.steps, total, args)
            optimizer.zero_grad()
            with autocast:
                loss = F.cross_entropy(model(images), classes)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.add(loss)
            log(optimizer)
            progress.update()
            if checkpoints is not None and optimizer.steps % epochs.steps:
                checkpoints.step(run=asdict(run), sent=optimizer.bytes_sent - before)
        loss = losses.take()  # waits for the GPU before the clock is read
        milliseconds = 1000 * (time.perf_counter() - begin) / (epochs.steps - first)
        megabytes, sent = (optimizer.bytes_sent - before) / 1e6, 0

        optimizer.join(scaler=scaler if mixed else None)  # all workers hold the mean
        some = epochs.batches(epoch)[: args.statistics]
        slowmo.recompute_statistics(model, (x for x, _ in batches(files, epoch, some, args.readers, device)))
        run.add(optimizer.steps, **slowmo.mean({"loss": loss, "ms": milliseconds, "mb": megabytes}))
        run.score.append(accuracy(model, test_images, args, device))
        progress.describe(f"{method}, seed {seed}, test accuracy {run.score[-1]:.1f} %")
        if checkpoints is not None:
            checkpoints.save(run=asdict(run))
            checkpoints.finish()
    return run


@torch.no_grad()
def accuracy(model: nn.Module, images: common.Images, args: Namespace, device: torch.device) -> float:
    """Return the share of correctly classified test images in %; each worker classifies a part of them."""
    model.eval()
    own = np.arange(len(images.paths))[slowmo.rank() :: slowmo.size()]
    size = max(1, args.batch_size // slowmo.size())
    numbers = [own[start : start + size] for start in range(0, len(own), size)]
    right = 0
    for x, classes in batches(Files(images, args.size, 0), None, numbers, args.readers, device):
        right += int((model(x).argmax(dim=1) == classes).sum())
    return slowmo.mean(100 * right / max(len(own), 1), weight=len(own))


def options(add: comparison.Add) -> None:
    add("--save-every", type=int, default=1000, help="steps between two checkpoints within an epoch")


def main() -> None:
    slowmo.init()
    args = common.parse(__doc__, slowmo.rank(), more=options)
    device = choose_device()
    data = common.load(args)
    steps = args.epochs * Epochs(len(data[0].paths), args.batch_size, 0, slowmo.rank(), slowmo.size()).steps
    runs = []
    with Progress(steps * args.seeds * len(args.methods), slowmo.rank()) as progress:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for method in args.methods:
                progress.describe(f"{method}, seed {seed}")
                runs.append(train(args, method, seed, data, device, progress))
    if slowmo.rank() == 0:
        common.report("torch", args, runs, slowmo.size())


if __name__ == "__main__":
    main()
