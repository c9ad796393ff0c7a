"""Compare Horovod's ways to send one vector to one other worker, as gossip does at every step, with an allreduce.

    horovodrun -np 4 python benchmarks/gossip_transport.py
    benchmarks/link.sh 1gbit horovodrun --network-interfaces lo -np 4 python benchmarks/gossip_transport.py

Every worker sends its vector to the next one (the first step of the topology "exponential"):
- alltoall: one collective of all workers, with the whole vector for one worker and nothing for the others;
- broadcast in pairs: a process set for each pair of workers, with the sender as root;
- allgather in pairs: the same process sets; the sender contributes its vector and the receiver nothing;
- swap by allgather: each pair of neighbours (0 and 1, 2 and 3, ..) exchanges vectors, which only symmetric topologies
  can use; each worker is in one process set only.
The ways take turns and poll unfinished collectives with the library's pause. Prints the median, smallest and largest
time, and the bytes sent on the loopback device per worker. These include no other traffic only in a separate network
namespace (benchmarks/link.sh).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import horovod.torch as hvd
import torch

Way = Callable[[], list[torch.Tensor]]
PAUSE_S = 0.0002


def sent_on_loopback() -> int:
    """Return the bytes that the loopback device has sent since it came up."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


def finish(handles: list[int]) -> list[torch.Tensor]:
    for handle in handles:
        while not hvd.poll(handle):
            time.sleep(PAUSE_S)
    return [hvd.synchronize(handle) for handle in handles]


def ways(x: torch.Tensor, sets: dict[tuple[int, int], hvd.ProcessSet]) -> dict[str, Way]:
    rank, size = hvd.rank(), hvd.size()
    onward, back = (rank + 1) % size, (rank - 1) % size
    to, by, swap = sets[rank, onward], sets[back, rank], sets[(rank, onward) if rank % 2 == 0 else (back, rank)]
    splits = torch.tensor([len(x) if i == onward else 0 for i in range(size)], dtype=torch.int32)
    came, summed, nothing = torch.empty_like(x), x.clone(), x[:0]

    def alltoall() -> list[torch.Tensor]:
        handle = hvd.alltoall_async(x, splits, name="alltoall")
        return [finish([handle])[0][0]]  # drop the received sizes

    def broadcast() -> list[torch.Tensor]:
        out = hvd.broadcast_async_(x, rank, name=f"broadcast.{rank}", process_set=to)
        in_ = hvd.broadcast_async_(came, back, name=f"broadcast.{back}", process_set=by)
        return finish([out, in_])[1:]

    def allgather() -> list[torch.Tensor]:
        out = hvd.allgather_async(x, name=f"allgather.{rank}", process_set=to)
        in_ = hvd.allgather_async(nothing, name=f"allgather.{back}", process_set=by)
        return finish([out, in_])[1:]

    def swapped() -> list[torch.Tensor]:
        both = finish([hvd.allgather_async(x, name="swap", process_set=swap)])[0].view(2, -1)
        return [both[1 - swap.rank()]]

    def allreduce() -> list[torch.Tensor]:
        summed.fill_(1.0)
        return finish([hvd.allreduce_async_(summed, op=hvd.Sum, name="allreduce")])

    found: dict[str, Way] = {
        "alltoall": alltoall,
        "broadcast in pairs": broadcast,
        "allgather in pairs": allgather,
        "swap by allgather": swapped,
        "allreduce, for reference": allreduce,
    }
    if size % 2:
        del found["swap by allgather"]
    return found


def check(name: str, came: torch.Tensor) -> None:
    """Check that the received vector is the sender's: its rank in every element."""
    partner = hvd.rank() ^ 1 if name.startswith("swap") else (hvd.rank() - 1) % hvd.size()
    expected = float(hvd.size()) if name.startswith("allreduce") else float(partner)
    assert bool((came == expected).all()), f"{name}: received {came[:3]} instead of {expected}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="number of measured rounds (default: %(default)s)")
    parser.add_argument("--megabytes", type=float, default=100, help="length of the vector (default: %(default)s)")
    parser.add_argument("--label", default="loopback", help="name of this network in the output (default: %(default)s)")
    args = parser.parse_args()
    size = int(os.environ["HOROVOD_SIZE"])  # hvd.init() needs the process sets
    if size < 3:
        parser.error("the process set of a pair must differ from that of all workers. Start three or more workers")
    links = [(i, (i + 1) % size) for i in range(size)]
    distinct = {frozenset(link): hvd.ProcessSet(sorted(link)) for link in links}
    hvd.init(process_sets=list(distinct.values()))
    torch.set_num_threads(1)
    x = torch.full((int(args.megabytes * 250_000),), float(hvd.rank()))
    methods = ways(x, {link: distinct[frozenset(link)] for link in links})
    times: dict[str, list[float]] = {name: [] for name in methods}
    traffic: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(args.rounds + 1):  # the first round warms up
        for name, way in methods.items():
            hvd.barrier()
            before, started = sent_on_loopback(), time.perf_counter()
            came = way()[0]
            hvd.barrier()
            if number:
                times[name].append(time.perf_counter() - started)
                traffic[name].append((sent_on_loopback() - before) / size / 1e6)
            check(name, came)
    if hvd.rank() == 0:
        print(f"\n{args.label}, {size} workers, a vector of {args.megabytes:g} MB; median of {args.rounds}")
        for name, seconds in times.items():
            span = f"{1e3 * min(seconds):7.0f} to {1e3 * max(seconds):6.0f}"
            wire = statistics.median(traffic[name])
            print(
                f"  {name:26} {1e3 * statistics.median(seconds):8.0f} ms ({span}) {wire:8.1f} MB on the wire per worker"
            )


if __name__ == "__main__":
    main()
