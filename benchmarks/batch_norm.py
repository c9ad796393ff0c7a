"""Show how BatchNorm's running statistics lag behind a model that jumps by its slow momentum, and the remedy.

    python benchmarks/batch_norm.py

A small residual network with BatchNorm on scikit-learn's digits, four workers as threads of this process, tau = 12.
BatchNorm's momentum is given in PyTorch's sense: 0.01 is Keras' default of 0.99, and 0.1 is PyTorch's. For each slow
momentum it prints the final training loss, and the test accuracy with the running statistics as they are and after
`slowmo.recompute_statistics`; means and standard deviations over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hvd_slowmo.torch as slowmo
from hvd_slowmo.comm.protocol import Comm
from hvd_slowmo.comm.threads import ThreadWorld

WORKERS = 4


class Block(nn.Module):
    """Two convolutions with BatchNorm around which the input is added."""

    def __init__(self, width: int, momentum: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width, momentum=momentum) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(x + self.norms[1](self.second(y)))


def network(momentum: float, width: int = 8) -> nn.Module:
    stem = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, momentum=momentum), nn.ReLU()]
    return nn.Sequential(*stem, *(Block(width, momentum) for _ in range(3)), nn.Flatten(), nn.Linear(64 * width, 10))


class TensorComm:
    """A ThreadWorld's collectives, which NumPy arrays go through, for tensors."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.rank, self.size, self.ranks, self.node = comm.rank, comm.size, comm.ranks, None

    def start_sum(self, name: str, x: torch.Tensor) -> tuple[object, torch.Tensor]:
        return self._comm.start_sum(name, x.numpy()), x

    def wait(self, handle: tuple[object, torch.Tensor]) -> torch.Tensor:
        self._comm.wait(handle[0])
        return handle[1]

    def gather(self, name: str, item: object) -> list[object]:
        return self._comm.gather(name, item)


def train(comm: Comm, beta: float, momentum: float, epochs: int, seed: int) -> tuple[float, float, float]:
    """Return the loss of the last epoch, and the test accuracy in % before and after recomputing."""
    images, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(classes)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, rest = shuffled[:360], shuffled[360:]
    mine = rest[comm.rank :: comm.size]
    random = torch.Generator().manual_seed(1000 * seed + comm.rank)
    torch.manual_seed(seed)
    model = network(momentum)
    inner = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    optimizer = slowmo.SlowMo(inner, model, tau=12, beta=beta, comm=TensorComm(comm))
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        for batch in mine[torch.randperm(len(mine), generator=random)].split(32)[:-1]:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    optimizer.join()

    @torch.no_grad()
    def accuracy() -> float:
        model.eval()
        return 100 * (model(x[test]).argmax(1) == y[test]).double().mean().item()

    before = accuracy()
    slowmo.recompute_statistics(model, [x[batch] for batch in mine.split(64)], comm=TensorComm(comm))
    return statistics.mean(losses), before, accuracy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of runs (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=9, help="passes over the data (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("momentum   beta   training loss   test accuracy, %   after recompute_statistics")
    for momentum in (0.01, 0.1):
        for beta in (0.0, 0.5):
            runs = []
            for seed in range(args.seeds):
                setting = {"beta": beta, "momentum": momentum, "epochs": args.epochs, "seed": seed}
                runs.append(ThreadWorld(WORKERS).run(partial(train, **setting))[0])
            columns = list(zip(*runs, strict=True))
            cells = [f"{statistics.mean(column):8.3g} ± {statistics.stdev(column):5.2g}" for column in columns]
            print(f"{momentum:8}   {beta:4}   {'   '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
