"""SlowMo against Local SGD and AR-SGD on scikit-learn's handwritten digits, with PyTorch.

Run it with: torchrun --nproc-per-node 4 examples/digits_torch.py
Or over Horovod: hvd-slowmo run -np 4 python examples/digits_torch.py
"""

import time
from collections.abc import Callable
from pathlib import Path

import digits_common as common
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

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


def train(args, method: str, seed: int, data: list[torch.Tensor], bar: tqdm) -> common.Run:
    """Train one method with one seed."""
    images, classes, test_images, test_classes = data
    run = common.Run(method, seed)
    config = common.METHODS[method](args)
    torch.manual_seed(seed)
    model = network().to(images.device)
    inner = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True)
    optimizer = slowmo.SlowMo(inner, model, config, metrics=args.logdir is not None)
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
            bar.update()
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
                run.accuracy.append(accuracy(model, test_images, test_classes))
    run.ms_per_step = slowmo.mean(1000 * seconds / optimizer.steps)
    run.mb_sent = sent / 1e6
    return run


def logger(logdir: Path | None, name: str) -> Callable[[slowmo.SlowMo], None]:
    """Return a function that writes the optimizer's metrics to TensorBoard after each outer step, on rank 0 only."""
    if logdir is None or slowmo.rank() != 0:
        return lambda optimizer: None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(logdir / name))

    def log(optimizer: slowmo.SlowMo) -> None:
        metrics = optimizer.metrics()
        if metrics is not None and metrics.step == optimizer.steps:
            for key, value in metrics._asdict().items():
                writer.add_scalar(f"slowmo/{key}", value, metrics.step)

    return log


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> float:
    """Return the share of correctly classified images, in %."""
    model.eval()
    return 100 * (model(images).argmax(dim=1) == classes).double().mean().item()


def main() -> None:
    slowmo.init()
    args = common.parse(__doc__, slowmo.rank())
    torch.set_num_threads(1)  # several workers share this machine's cores
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", slowmo.local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    arrays = common.load()
    data = [torch.from_numpy(array).to(device) for array in arrays]

    runs = []
    steps = args.epochs * common.steps_per_epoch(arrays, args.batch_size, slowmo.size())
    total = steps * args.seeds * len(args.methods)
    with tqdm(total=total, unit="step", mininterval=0.5, disable=slowmo.rank() != 0) as bar:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for method in args.methods:
                bar.set_description(f"{method}, seed {seed}")
                runs.append(train(args, method, seed, data, bar))
    if slowmo.rank() == 0:
        common.report("digits_torch", args, runs, slowmo.size())


if __name__ == "__main__":
    main()
