"""SlowMo in a loop with Lightning Fabric.

Run it with: torchrun --nproc-per-node 2 examples/fabric_torch.py
Or over Horovod: hvd-slowmo run -np 2 python examples/fabric_torch.py
"""

import circle_torch as circle
import torch
from lightning.fabric import Fabric
from torch import nn

import hvd_slowmo.torch as slowmo


def main() -> None:
    slowmo.init()
    fabric = Fabric(devices=1)  # per process: SlowMo connects the processes, and not Fabric's DDP
    model = fabric.to_device(circle.network())  # before SlowMo, which keeps its state where the model is
    inner = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    slow = slowmo.SlowMo(inner, model, tau=12)
    model, optimizer = fabric.setup(model, slow)
    for _ in range(circle.EPOCHS):
        for x, inside in fabric.setup_dataloaders(circle.shard(slowmo.rank(), slowmo.size())):
            optimizer.zero_grad()
            fabric.backward(nn.functional.binary_cross_entropy_with_logits(model(x), inside))
            optimizer.step()
        slow.join()  # from here on all ranks hold the same model
    circle.report(model)


if __name__ == "__main__":
    main()
