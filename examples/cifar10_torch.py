"""SlowMo against Local SGD with ResNet-18 on CIFAR-10, as in the paper, or on 5,000 images of MNIST; with PyTorch.

Run it with: torchrun --nproc-per-node 4 examples/cifar10_torch.py --dataset mnist5k
Or over Horovod: hvd-slowmo run -np 4 python examples/cifar10_torch.py --data DIRECTORY --checkpoints DIRECTORY
"""

import time
from argparse import Namespace
from dataclasses import asdict

import comparison
import images_common as common
import numpy as np
import torch
from progress import Progress
from resnet_torch import resnet18
from torch import nn
from torch.nn import functional as F
from torch_common import Mean, choose_device, logger

import hvd_slowmo.torch as slowmo


def tensors(images: np.ndarray, classes: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch as PyTorch takes it, images (n, channels, height, width)."""
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return torch.from_numpy(images).to(device), torch.from_numpy(classes).to(device)


def train(
    args: Namespace, method: str, seed: int, data: common.Data, device: torch.device, progress: Progress
) -> comparison.Run:
    """Train one method with one seed, from the newest checkpoint if there is one."""
    batches = common.Batches(data, args, seed, slowmo.rank(), slowmo.size())
    total = args.epochs * batches.steps
    torch.manual_seed(seed)
    model = resnet18(data.train_images.shape[-1], 10, args.width).to(device)
    inner = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay)
    optimizer = slowmo.SlowMo(inner, model, comparison.METHODS[method](args), metrics=args.logdir is not None)
    log = logger(args.logdir, f"{method}-{seed}")
    run, checkpoints = comparison.Run(method, seed), None
    if args.checkpoints is not None:
        checkpoints = slowmo.Checkpoints(args.checkpoints / f"{method}-{seed}")
        progress.skip(checkpoints.resume(optimizer))
        run = comparison.Run(**checkpoints.values.get("run", asdict(run)))

    for epoch in range(optimizer.steps // batches.steps, args.epochs):
        model.train()
        begin, before, losses = time.perf_counter(), optimizer.bytes_sent, Mean()
        for batch in batches.epoch(epoch):
            images, classes = tensors(*batch, device)
            for group in optimizer.param_groups:
                group["lr"] = common.learning_rate(optimizer.steps, total, args)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), classes)
            loss.backward()
            optimizer.step()
            losses.add(loss)
            log(optimizer)
            progress.update()
        loss = losses.take()  # waits for the GPU before the clock is read
        milliseconds = 1000 * (time.perf_counter() - begin) / batches.steps
        sent = optimizer.bytes_sent - before

        optimizer.join()  # all workers hold the mean
        slowmo.recompute_statistics(
            model, (tensors(*batch, device)[0] for batch in batches.epoch(epoch, args.statistics))
        )
        run.add(optimizer.steps, **slowmo.mean({"loss": loss, "ms": milliseconds, "mb": sent / 1e6}))
        run.score.append(accuracy(model, batches, device))
        if checkpoints is not None:
            checkpoints.save(run=asdict(run))
            checkpoints.finish()
        progress.describe(f"{method}, seed {seed}, test accuracy {run.score[-1]:.1f} %")
    return run


@torch.no_grad()
def accuracy(model: nn.Module, batches: common.Batches, device: torch.device) -> float:
    """Return the share of correctly classified test images in %; each worker classifies a part of them."""
    model.eval()
    right = count = 0
    for batch in batches.test():
        images, classes = tensors(*batch, device)
        right += int((model(images).argmax(dim=1) == classes).sum())
        count += len(classes)
    return slowmo.mean(100 * right / max(count, 1), weight=count)


def main() -> None:
    slowmo.init()
    args = common.parse(__doc__, slowmo.rank())
    device = choose_device()
    data = common.load(args)
    steps = args.epochs * common.Batches(data, args, 0, slowmo.rank(), slowmo.size()).steps
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
