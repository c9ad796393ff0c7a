"""Points inside a circle: data, model and result of the examples with loops of other libraries, and a plain loop.

Run it with: torchrun --nproc-per-node 2 examples/circle_torch.py
"""

import hashlib

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hvd_slowmo.torch as slowmo

EPOCHS = 4


def network() -> nn.Module:
    """Return a small network, with the same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))


def points() -> TensorDataset:
    """Return 4096 points of the plane, and whether each lies inside the unit circle."""
    x = torch.randn(4096, 2, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x.norm(dim=1, keepdim=True) < 1).float())


def shard(rank: int, size: int) -> DataLoader:
    """Return the batches of one rank: every size-th of the first 3072 points."""
    x, inside = points()[rank:3072:size]
    return DataLoader(TensorDataset(x, inside), batch_size=16)


def report(model: nn.Module) -> None:
    """Print the accuracy on the last 1024 points, and a fingerprint of the weights, which is equal on all ranks."""
    x, inside = points()[3072:]
    with torch.no_grad():
        accuracy = 100 * ((model(x) > 0) == (inside > 0)).float().mean().item()
    digest = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in model.state_dict().values())).hexdigest()
    print(f"rank {slowmo.rank()} of {slowmo.size()}: test accuracy {accuracy:.1f} %, weights {digest[:16]}", flush=True)


def main() -> None:
    slowmo.init()
    model = network()
    optimizer = slowmo.SlowMo(torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9), model, tau=12)
    for _ in range(EPOCHS):
        for x, inside in shard(slowmo.rank(), slowmo.size()):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(x), inside).backward()
            optimizer.step()
        optimizer.join()
    report(model)


if __name__ == "__main__":
    main()
