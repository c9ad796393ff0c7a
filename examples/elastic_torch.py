"""A job whose workers come and go: scikit-learn's handwritten digits, with PyTorch.

Run it with: horovodrun -np 2 --min-np 1 --max-np 4 --host-discovery-script ./discover.sh \
    python examples/elastic_torch.py
`make demo-elastic` does it on this machine, kills a worker, adds one, and draws the loss.
"""

import argparse
import json
import os
import time
from pathlib import Path

import digits_common as common
import torch
from horovod.torch.elastic import ElasticSampler
from torch import nn
from torch.nn import functional as F

import hvd_slowmo.torch as slowmo


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="per worker (default: %(default)s)")
    parser.add_argument("--tau", type=int, default=12, help="steps per block (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait in each step (default: %(default)s)")
    parser.add_argument("--record", type=Path, help="directory for the losses and each worker's process number")
    return parser.parse_args()


args = options()
slowmo.init()
torch.set_num_threads(1)  # several workers share this machine's cores
torch.manual_seed(0)
images, classes, test_images, test_classes = (torch.from_numpy(array) for array in common.load())
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
optimizer = slowmo.SlowMo(inner, model, tau=args.tau, beta=0.5)
sampler = ElasticSampler(images)  # deals the rest of an epoch anew when the workers change


def log(**entry: object) -> None:
    """Append an entry to this worker's file."""
    if args.record is not None:
        with (args.record / f"{os.environ.get('HOROVOD_HOSTNAME', 'alone')}.jsonl").open("a") as file:
            print(json.dumps({"time": time.time(), **entry}), file=file)


@slowmo.elastic.run
def train(state: slowmo.elastic.State) -> None:
    change = state.changes[-1]
    log(process=os.getpid(), **change._asdict())
    if slowmo.rank() == 0:
        print(f"step {change.step}: {change.workers} workers, {change.seconds:.1f} s to come together", flush=True)
    while state.epoch < args.epochs:
        loader = torch.utils.data.DataLoader(range(len(images)), batch_size=args.batch_size, sampler=state.sampler)
        for number, batch in enumerate(loader):
            state.optimizer.zero_grad()
            loss = F.cross_entropy(state.model(images[batch]), classes[batch])
            loss.backward()
            time.sleep(args.pause)
            state.optimizer.step()
            log(step=state.optimizer.steps, loss=loss.item())
            state.sampler.record_batch(number, args.batch_size)
            state.commit()
        state.epoch += 1
        state.sampler.set_epoch(state.epoch)
    state.optimizer.join()


train(slowmo.elastic.State(model, optimizer, epoch=0, sampler=sampler))
if slowmo.rank() == 0:
    with torch.no_grad():
        accuracy = 100 * (model(test_images).argmax(1) == test_classes).double().mean().item()
    print(f"test accuracy {accuracy:.1f} % after {optimizer.steps} steps, {slowmo.size()} workers at the end")
