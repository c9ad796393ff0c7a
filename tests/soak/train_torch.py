"""A PyTorch worker of the soak."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hvd_slowmo.torch as slowmo
from hvd_slowmo.errors import CheckpointError
from soak.diary import TAU, Diary, batches_of, digest, rate


@contextmanager
def full_disk(now: bool):
    """Let no file grow, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if now:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def main() -> None:
    diary = Diary(Path(sys.argv[1]))
    diary.start_slowly()
    slowmo.init()
    torch.set_num_threads(1)
    data = load_digits()
    images, classes = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    inner = torch.optim.SGD(model.parameters(), lr=0.04, momentum=0.9)
    optimizer = slowmo.SlowMo(inner, model, tau=TAU, beta=0.5, nonfinite="exclude")

    def values() -> str:
        return digest(p.detach().numpy() for p in model.parameters())

    def train_epoch(state: slowmo.elastic.State, since: list) -> None:
        count, rng = batches_of(state.epoch, slowmo.rank())
        for group in optimizer.param_groups:
            group["lr"] = rate(state.epoch)
        for _ in range(count):
            batch = torch.from_numpy(rng.integers(0, 1500, 16))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), classes[batch])
            (loss * float("nan") if diary.ordered("nan") else loss).backward()
            optimizer.step()
            diary.hang_if_ordered()
            if optimizer.steps % TAU == 0:
                diary.note("outer", step=optimizer.steps, digest=values(), since=[*since, state.epoch])
            time.sleep(0.005)
            state.commit()

    def save(epoch: int) -> None:
        try:
            with full_disk(diary.ordered("full")):
                optimizer.save(diary.folder / "saved.slowmo")
            diary.note("save", epoch=epoch)
        except (OSError, ValueError) as error:
            diary.note("unsaved", epoch=epoch, error=type(error).__name__)

    @slowmo.elastic.run
    def train(state: slowmo.elastic.State) -> None:
        change = state.changes[-1]
        since = [change.step, change.workers, list(change.newcomers)]
        diary.note_change(rank=slowmo.rank(), **change._asdict())
        kept = optimizer.worker.store.vectors
        common = digest(x.detach().numpy() for name in ("anchor", "v") for x in kept[name] if x is not None)
        diary.note("common", step=0, digest=common, since=since)
        while True:
            train_epoch(state, since)
            optimizer.join()
            diary.note("join", step=optimizer.steps, digest=values(), since=[*since, state.epoch])
            if state.epoch % 3 == 0:
                with optimizer.averaged_parameters(), torch.no_grad():
                    model.eval()
                    accuracy = (model(images[1500:]).argmax(1) == classes[1500:]).double().mean().item()
                    model.train()
                diary.note("accuracy", step=optimizer.steps, accuracy=accuracy)
            if state.epoch % 4 == 0:
                save(state.epoch)
            if state.epoch % 20 == 19 and slowmo.mean(float((diary.folder / "saved.slowmo").exists())) == 1:
                try:
                    optimizer.load(diary.folder / "saved.slowmo")
                    diary.note("load", step=optimizer.steps)
                except (CheckpointError, ValueError) as error:  # of another number of workers, within a block
                    diary.note("unloaded", error=str(error)[:200])
            state.epoch += 1
            if slowmo.mean(float(diary.stopping)) > 0:
                return

    train(slowmo.elastic.State(model, optimizer, epoch=0))
    diary.note("end", step=optimizer.steps, digest=values())


if __name__ == "__main__":
    main()
