"""SlowMo against Local SGD and AR-SGD on scikit-learn's handwritten digits, with PyTorch.

Run it with: torchrun --nproc-per-node 4 examples/digits_torch.py
Or over Horovod: hvd-slowmo run -np 4 python examples/digits_torch.py
"""

import time

import comparison
import digits_common as common
import numpy as np
import torch
from progress import Progress
from torch import nn
from torch.nn import functional as F
from torch_common import choose_device, logger

import hvd_slowmo.torch as slowmo


def network() -> nn.Module:
    """Return a small convolutional network for images of shape (n, 8, 8)."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def train(args, method: str, seed: int, data: list[torch.Tensor], progress: Progress) -> comparison.Run:
    """Train one method with one seed."""
    images, classes, test_images, test_classes = data
    run = comparison.Run(method, seed)
    config = comparison.METHODS[method](args)
    torch.manual_seed(seed)
    model = network().to(images.device)
    inner = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True)
    optimizer = slowmo.SlowMo(inner, model, config, metrics=args.metrics or args.logdir is not None)
    log = logger(args.logdir, f"{method}-{seed}")
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [args.epochs - args.epochs // 5])

    mine = common.shard(classes.cpu().numpy(), args.shards, slowmo.rank(), slowmo.size(), seed)
    rng = np.random.default_rng([seed, slowmo.rank()])
    seconds, sent = 0.0, 0
    for _ in range(args.epochs):
        model.train()
        begin, before, losses = time.perf_counter(), optimizer.bytes_sent, []
        for batch in common.batches(mine, args.batch_size, rng):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), classes[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            log(optimizer)
            if args.metrics and (seen := optimizer.metrics()) is not None and seen.step == optimizer.steps:
                run.metrics.append(seen)
            progress.update()
        loss = torch.stack(losses).mean().cpu()  # waits for the GPU before the clock is read
        seconds += time.perf_counter() - begin
        sent += optimizer.bytes_sent - before
        scheduler.step()

        run.steps.append(optimizer.steps)
        run.loss.append(slowmo.mean(loss.item()))
        if len(run.steps) == args.epochs:
            optimizer.join()  # at the end all workers keep the mean
        with optimizer.averaged_parameters():  # a collective: every worker enters, although only rank 0 evaluates
            if slowmo.rank() == 0:
                run.score.append(accuracy(model, test_images, test_classes))
    run.ms_per_step = slowmo.mean(1000 * seconds / optimizer.steps)
    run.mb_sent = sent / 1e6
    return run


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> float:
    """Return the share of correctly classified images, in %."""
    model.eval()
    return 100 * (model(images).argmax(dim=1) == classes).double().mean().item()


def main() -> None:
    slowmo.init()
    args = common.parse(__doc__, slowmo.rank())
    device = choose_device()
    arrays = common.load()
    data = [torch.from_numpy(array).to(device) for array in arrays]

    runs = []
    steps = args.epochs * common.steps_per_epoch(arrays, args.batch_size, slowmo.size())
    total = steps * args.seeds * len(args.methods)
    with Progress(total, slowmo.rank()) as progress:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for method in args.methods:
                progress.describe(f"{method}, seed {seed}")
                runs.append(train(args, method, seed, data, progress))
    if slowmo.rank() == 0:
        common.report("digits_torch", args, runs, slowmo.size())


if __name__ == "__main__":
    main()
