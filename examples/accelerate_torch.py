"""SlowMo in a loop with accelerate.

Run it with: torchrun --nproc-per-node 2 examples/accelerate_torch.py
Or: accelerate launch --num_processes 2 examples/accelerate_torch.py
"""

import circle_torch as circle
import torch
from accelerate import Accelerator
from torch import nn

import hvd_slowmo.torch as slowmo


def main() -> None:
    accelerator = Accelerator()  # connects the processes with torch.distributed, which SlowMo uses then
    slowmo.init()
    model = circle.network().to(accelerator.device)
    inner = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    slow = slowmo.SlowMo(inner, model, tau=12)
    optimizer = accelerator.prepare(slow)  # not the model: prepare() would wrap it in DDP, which averages gradients
    for _ in range(circle.EPOCHS):
        for x, inside in circle.shard(slowmo.rank(), slowmo.size()):
            x, inside = x.to(accelerator.device), inside.to(accelerator.device)
            optimizer.zero_grad()
            accelerator.backward(nn.functional.binary_cross_entropy_with_logits(model(x), inside))
            optimizer.step()
        slow.join()  # from here on all ranks hold the same model
    circle.report(model)


if __name__ == "__main__":
    main()
