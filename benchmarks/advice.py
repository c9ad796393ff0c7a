"""Compare the step times that `hvd-slowmo advise` predicts with measured ones, in one job.

    benchmarks/link.sh 1gbit hvd-slowmo run --network-interfaces lo -np 2 python benchmarks/advice.py --label 1gbit
    benchmarks/advice.sh results/advice.jsonl     # loopback, 1 Gbit/s and 100 Mbit/s, 2 and 4 workers

First it measures the links and the processors, as the command does; then the methods take turns, as in step_time.py,
whose network and options these are. The step time that the prediction starts from is that without communication, of the
same job. Prints predicted and measured milliseconds per step, and their ratio, for the median of the rounds and for the
fastest one, which other programs of a busy machine disturb less.
"""

from __future__ import annotations

import json
import statistics

import step_time
import torch
import torch.distributed as dist
import turns
from transport import add_store, connect

from hvd_slowmo.advice.cost import Job, cost
from hvd_slowmo.advice.host import Host
from hvd_slowmo.advice.link import Link
from hvd_slowmo.advice.measuring import measure_link
from hvd_slowmo.advice.training import Training, training_of
from hvd_slowmo_torch.advice.host import measure_host
from hvd_slowmo_torch.comm import workers

METHODS = (
    "ours: AR-SGD",
    "ours: Local SGD",
    "ours: SlowMo",
    "ours: SGP",
    "ours: OSGP",
    "ours: D-PSGD",
    "ours: SlowMo, streamed",
    "ours: SlowMo, streamed, 8 bits, 1 late",
)


def main() -> None:
    parser = turns.options(__doc__, [])
    parser.set_defaults(methods=METHODS, rounds=3, steps=4)
    parser.add_argument("--batch-size", type=int, default=32, help="per worker and step (default: %(default)s)")
    add_store(parser)
    args = parser.parse_args()
    transport = connect(args.store)
    torch.set_num_threads(1)
    comm = workers.connect(**transport)
    link, _ = measure_link(comm, lambda size, dtype: torch.zeros(size, dtype=getattr(torch, dtype)))
    host = measure_host(comm)
    methods = turns.ours(args.tau_gossip)

    def make(name: str) -> turns.Step:
        if name == turns.ALONE:
            return step_time.training(step_time.METHODS[name], args.batch_size, args.shrink, args.pause)
        wrap = step_time.ours(*methods[name], transport)
        return step_time.training(wrap, args.batch_size, args.shrink, args.pause)

    names = [turns.ALONE, *args.methods]
    blocks = {name: turns.block_of(name, args.tau_gossip) for name in names}
    steps = {name: make(name) for name in names}
    times = turns.measure(steps, args.rounds, args.steps, dist.barrier, comm.rank == 0, blocks)
    if comm.rank == 0:
        _tell(args, times, link, host)
    dist.barrier()
    dist.destroy_process_group()


def _tell(args: turns.Namespace, times: dict[str, list[float]], link: Link, host: Host) -> None:
    parameters = sum(p.numel() for p in step_time.network(args.shrink).parameters())
    print(f"\n{args.label}, {link.workers} workers, {parameters:,} parameters\n  {link}\n  {host}")
    for name in args.methods:
        row: dict[str, str | float] = {
            "network": args.label, "workers": link.workers, "method": name, "parameters": parameters,
            "pause": args.pause or 0.0,
        }  # fmt: skip
        words = []
        for kind, pick in (("median", statistics.median), ("least", min)):
            alone, measured = pick(times[turns.ALONE]), pick(times[name])
            config, _ = turns.ours(args.tau_gossip)[name]
            predicted = cost(config, Job(_training(args, parameters, alone), link, host)).seconds
            row |= {f"{kind} alone": alone, f"{kind} predicted": predicted, f"{kind} measured": measured}
            ratio = predicted / measured
            words.append(f"{kind}: {1e3 * predicted:.0f} ms predicted, {1e3 * measured:.0f} measured, {ratio:.2f} x")
        print(f"  {name:40} {'; '.join(words)}", flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _training(args: turns.Namespace, parameters: int, alone: float) -> Training:
    """Return the training run that a prediction starts from: all of a step but the pause is work of the processor."""
    if args.pause is None:
        return training_of(parameters, alone, work=alone)
    return training_of(parameters, alone, work=alone - args.pause / 1e3)._replace(backward=0.0)  # there is no backward


if __name__ == "__main__":
    main()
