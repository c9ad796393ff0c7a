"""SlowMo in a module of Lightning with manual optimization.

Run it with: torchrun --nproc-per-node 2 examples/lightning_torch.py
Or over Horovod: hvd-slowmo run -np 2 python examples/lightning_torch.py
"""

import circle_torch as circle
import lightning as L
import torch
from torch import nn

import hvd_slowmo.torch as slowmo


class Circle(L.LightningModule):
    """A classifier of points."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = circle.network()

    def configure_optimizers(self) -> slowmo.SlowMo:
        inner = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        return slowmo.SlowMo(inner, self, tau=12)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], number: int) -> None:
        x, inside = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.binary_cross_entropy_with_logits(self.model(x), inside))
        optimizer.step()

    def on_train_epoch_end(self) -> None:
        self.optimizers().join()  # from here on all ranks hold the same model


def main() -> None:
    slowmo.init()
    first = slowmo.rank() == 0  # it alone shows the progress and writes logs and checkpoints
    trainer = L.Trainer(
        max_epochs=circle.EPOCHS,
        strategy="auto",  # one device per process: SlowMo connects the processes, and not Lightning's DDP
        devices=1,
        enable_progress_bar=first,
        enable_checkpointing=first,
        logger=first,
        default_root_dir="results",
    )
    module = Circle()
    trainer.fit(module, circle.shard(slowmo.rank(), slowmo.size()))
    circle.report(module.model)


if __name__ == "__main__":
    main()
