"""A PyTorch worker of the soak."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hvd_slowmo.torch as slowmo
from soak.diary import SHORT_EPOCH, TAU, Diary, digest, rate


def main() -> None:
    diary = Diary(Path(sys.argv[1]))
    diary.start_slowly()
    slowmo.init()
    torch.set_num_threads(1)
    data = load_digits()
    images, classes = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    model = nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 512), nn.BatchNorm1d(512), nn.ReLU()),
        *(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)),
    )
    inner = torch.optim.SGD(model.parameters(), lr=0.04, momentum=0.9, weight_decay=5e-3)
    optimizer = slowmo.SlowMo(inner, model, tau=TAU, beta=0.5, nonfinite="exclude")
    scaler = torch.amp.GradScaler("cpu", growth_interval=200)

    def own() -> int:
        return int(np.sum(optimizer.worker.progress.since))

    def vectors() -> list[torch.Tensor]:
        kept = optimizer.worker.store.vectors
        return [x for name in ("anchor", "v") for x in kept[name] if x is not None]

    def everything() -> str:
        """Return a digest of parameters, statistics, anchor and momentum."""
        values = [x for x in model.state_dict().values() if x.is_floating_point()]
        return digest(x.detach().numpy() for x in (*values, *vectors()))

    def train_batch(batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), classes[batch])
        if diary.ordered("nan"):  # past the scaler, which would skip the step
            (loss * torch.nan).backward()
            optimizer.step()
            return
        scaler.scale(loss * torch.inf if diary.ordered("overflow") else loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def average(where: list) -> None:
        with optimizer.averaged_parameters(), torch.no_grad():
            model.eval()
            loss = F.cross_entropy(model(images[1500:]), classes[1500:]).item()
            model.train()
            values = digest(p.detach().numpy() for p in model.parameters())
            diary.note("average", step=optimizer.steps, digest=values, since=where, loss=loss)

    def train_epoch(state: slowmo.elastic.State, where: list) -> None:
        count, rng = diary.batches(state.epoch, slowmo.rank())
        for group in optimizer.param_groups:
            group["lr"] = rate(state.epoch)
        for number in range(1, count + 1):
            train_batch(torch.from_numpy(rng.integers(0, 1500, 16)))
            diary.stand(optimizer.steps, own())
            diary.hang_if_ordered()
            if optimizer.steps % TAU == 0:
                diary.note("outer", step=optimizer.steps, digest=everything(), since=where)
            if number == SHORT_EPOCH - 1 and state.epoch % 2 == 0:
                average(where)
            time.sleep(0.005)
            state.commit()

    @slowmo.elastic.run
    def train(state: slowmo.elastic.State) -> None:
        change = state.changes[-1]
        since = [change.step, change.workers, list(change.newcomers)]
        diary.note_change(own(), rank=slowmo.rank(), **change._asdict())
        diary.note("common", step=0, digest=digest(x.detach().numpy() for x in vectors()), since=since)
        while True:
            where = [*since, state.epoch]
            train_epoch(state, where)
            diary.begin_join()
            optimizer.join(scaler=scaler)
            diary.note_join(step=optimizer.steps, digest=everything(), since=where)
            if state.epoch % 4 == 0:
                diary.save(optimizer.save, state.epoch)
            if state.epoch % 10 == 9:
                diary.load(optimizer.load, slowmo.mean, state.epoch)
            state.epoch += 1
            if slowmo.mean(float(diary.stopping)) > 0:
                return

    train(slowmo.elastic.State(model, optimizer, epoch=0, scaler=scaler))
    diary.note("end", step=optimizer.steps)


if __name__ == "__main__":
    main()
