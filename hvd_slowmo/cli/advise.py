"""The subcommand `advise`."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from hvd_slowmo.advice.cost import Job
from hvd_slowmo.advice.host import Host
from hvd_slowmo.advice.link import Link, link_of
from hvd_slowmo.advice.measuring import Neighbours, measure_link
from hvd_slowmo.advice.recommend import Advice, Row, advise, rows_of
from hvd_slowmo.advice.training import Training, load_training, training_of
from hvd_slowmo.cli.arguments import at_least, refusals
from hvd_slowmo.cli.console import show
from hvd_slowmo.cli.table import table
from hvd_slowmo.cli.units import bytes_per_second, count, seconds, seconds_or_zero, share
from hvd_slowmo.comm.launcher import launched
from hvd_slowmo.errors import CommandError, spell_error

HEAD = ("method", "tau", "fragments", "bits", "ms per step", "overhead", "MB per step", "MB of memory", "hidden")


def add_advise(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `advise` to the command line."""
    parser = commands.add_parser(
        "advise",
        help="predict the time of a step with each method on this network, and recommend settings",
        description="Under horovodrun or torchrun it measures the links between the workers; with --bandwidth and "
        "--workers it takes them as given, in one process. It prints the predicted time of a step, traffic and memory "
        "of each method, and the smallest tau whose overhead is below --share.",
    )
    training = parser.add_argument_group("the training run")
    training.add_argument("--measured", type=Path, metavar="FILE", help="what slowmo.measure(optimizer) has saved")
    training.add_argument("--parameters", type=count, metavar="N", help="number of parameters, such as 25.2M")
    training.add_argument(
        "--step-time", type=seconds, metavar="TIME", help="time of a step without communication, such as 180ms"
    )
    training.add_argument(
        "--cpu-time",
        type=seconds_or_zero,
        metavar="TIME",
        help="processor time of such a step, over all threads; 0s, the default, where a device computes",
    )
    network = parser.add_argument_group("the network, where it is not measured")
    network.add_argument("--bandwidth", type=bytes_per_second, metavar="RATE", help="of each worker, such as 1gbit")
    network.add_argument("--latency", type=seconds_or_zero, metavar="TIME", help="of a message, such as 0.5ms (0s)")
    network.add_argument("--workers", type=at_least(2), metavar="N", help="number of workers")
    parser.add_argument("--share", type=share, default=0.05, metavar="PERCENT", help="overhead to stay below (5%%)")
    parser.add_argument(
        "--tau", type=at_least(2), nargs="+", default=[4, 12, 48], metavar="N", help="rows of the table (4 12 48)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table into this file too")
    parser.set_defaults(run=lambda arguments: _advise(parser, arguments))


def _advise(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    _check(parser, arguments)
    if arguments.bandwidth is not None:
        job = Job(_training(arguments), link_of(arguments.bandwidth, arguments.latency or 0.0, arguments.workers))
        print(
            f"{arguments.workers} workers on paper: {8e-6 * arguments.bandwidth:g} Mbit/s each, "
            f"{1e3 * (arguments.latency or 0.0):g} ms of latency. Copies and encoding, which are not counted here, are "
            "measured under horovodrun."
        )
        _tell(job, arguments)
        return 0
    if launched().workers == 1:
        parser.error(
            "there is nothing to measure between one worker. Start it with: horovodrun -np 4 hvd-slowmo advise ..., or "
            "give --bandwidth and --workers."
        )
    return _measure(arguments)


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with status 2 where options are missing or contradict each other."""
    own = [arguments.parameters, arguments.step_time]
    if arguments.measured is not None and any(value is not None for value in (*own, arguments.cpu_time)):
        parser.error("--measured has step time and parameters: leave out --parameters, --step-time and --cpu-time.")
    if arguments.measured is None and None in own:
        parser.error("give --measured FILE of slowmo.measure(optimizer), or --parameters and --step-time.")
    paper = [arguments.bandwidth, arguments.workers]
    if (arguments.latency, *paper) != (None, None, None) and None in paper:
        parser.error("a link on paper needs --bandwidth and --workers. Leave them and --latency out to measure it.")


def _training(arguments: argparse.Namespace) -> Training:
    if arguments.measured is None:
        return training_of(arguments.parameters, arguments.step_time, arguments.cpu_time or 0.0)
    with refusals():
        return load_training(arguments.measured)


def _measure(arguments: argparse.Namespace) -> int:
    """Measure the links between the workers, and print on rank 0. A collective."""
    try:
        import torch
    except ImportError as error:
        raise CommandError(
            f"the links are measured with PyTorch, which cannot be imported ({error}). Install it, or give --bandwidth "
            "and --workers."
        ) from error

    from hvd_slowmo.torch import init
    from hvd_slowmo_torch.advice.host import measure_host
    from hvd_slowmo_torch.comm.workers import connect

    init()
    comm = connect()
    training: Training | None = None
    failure: Exception | None = None
    if comm.rank == 0:  # the file need not be on other machines
        try:
            training = _training(arguments)
        except (CommandError, OSError) as caught:
            failure = caught
    if any(comm.gather("advise.errors", None if failure is None else spell_error(failure))):
        if failure is not None:
            raise failure
        return 1
    link, neighbours = measure_link(comm, lambda size, dtype: torch.zeros(size, dtype=getattr(torch, dtype)))
    host = measure_host(comm)
    try:
        if training is not None:
            show(_measured(link, neighbours, host))
            _tell(Job(training, link, host), arguments)
    finally:
        comm.gather("advise.end", None)  # no worker ends while another one still prints
    return 0


def _measured(link: Link, neighbours: Neighbours, host: Host) -> str:
    """Return the measurements as text."""
    workers, slowest = link.workers, neighbours.slowest
    lines = [f"{workers} workers, measured:"]
    names = ("sum", link.sums), ("message", link.pushes), ("alltoall", link.alltoalls), ("allgather", link.allgathers)
    for name, line in names:
        lines.append(f"  {name:9}  {1e3 * line.latency:7.2f} ms + {_milliseconds(line.per_byte)} per MB")
    lines.append(
        f"  a message between neighbours takes {neighbours.spread:.2f} times as long on the slowest link, from rank "
        f"{slowest} to {(slowest + 1) % workers}, as on the fastest"
    )
    lines.append(f"  {host.cores:g} processor cores per worker; their part in an outer step:")
    works = {"average": host.average, "SlowMo": host.slowmo, "late": host.late_work(32)}
    for name, work in {**works, **{f"{bits} bits": host.late_work(bits) for bits in (8, 4)}}.items():
        lines.append(f"  {name:9}  {1e3 * work.both.latency:7.2f} ms + {_milliseconds(work.both.per_byte)} per MB")
    return "\n".join(lines)


def _milliseconds(per_byte: float) -> str:
    return f"{1e9 * per_byte:.3g} ms"


def _tell(job: Job, arguments: argparse.Namespace) -> None:
    """Print the table and the recommendation."""
    training = job.training
    print(
        f"{training.parameters:,} parameters ({training.length / 1e6:.1f} MB), {1e3 * training.seconds:.4g} ms per "
        "step without communication\n"
    )
    rows = rows_of(job, list(dict.fromkeys(arguments.tau)))
    print(table(HEAD, [_cells(row) for row in rows]), end="\n\n")
    print(_recommendation(advise(job, arguments.share), arguments.share))
    if arguments.csv is not None:
        _write(arguments.csv, rows)
        show(f"Written: {arguments.csv}")


def _cells(row: Row) -> tuple[str, ...]:
    config, cost = row.config, row.cost
    blocks = "" if config.tau is None else str(config.tau)
    streamed = (str(config.fragments), str(config.bits)) if config.tau is not None else ("", "32")
    return (
        row.form.name,
        blocks,
        *streamed,
        f"{1e3 * cost.seconds:.4g}",
        f"{100 * cost.overhead:.1f} %",
        f"{cost.sent / 1e6:.4g}",
        f"{cost.memory / 1e6:.4g}",
        f"{100 * cost.hidden:.0f} %",
    )


def _recommendation(advice: Advice, share: float) -> str:
    """Return the recommendation as text."""
    below = f"{100 * share:g} %"
    plain = f"Plain data-parallel training (AR-SGD, DistributedOptimizer) costs {100 * advice.plain.overhead:.1f} %"
    lines = []
    if advice.plain_suffices:
        lines.append(f"{plain} here, at most {below}: it is good enough.")
    elif not advice.choices:
        return (
            f"{plain}, and no method stays below {below} here. Raise --share, or take the one with the least overhead."
        )
    else:
        lines.append(f"{plain} here, more than {below}.")
    for number, choice in enumerate(advice.choices):
        word = "Recommended" if number == 0 and not advice.plain_suffices else "Also below " + below
        lines.append(f"{word}: {choice.code}, {1e3 * choice.cost.seconds:.4g} ms, {100 * choice.cost.overhead:.1f} %")
    return "\n".join(lines)


def _write(path: Path, rows: Sequence[Row]) -> None:
    """Write the table as a CSV file, in bytes and seconds."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("method", "settings", "tau", "fragments", "delay", "bits", *rows[0].cost._fields))
        for row in rows:
            config = row.config
            code = row.form.code.format(tau=config.tau)
            writer.writerow(
                (row.form.name, code, config.tau or "", config.fragments, config.delay, config.bits, *row.cost)
            )
