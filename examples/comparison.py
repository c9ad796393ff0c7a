"""Methods to compare, their options, and the table and figure of the results; all examples with a task share this."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from hvd_slowmo import DPSGD, SGP, SlowMoConfig
from hvd_slowmo.core.step.metrics import Metrics


def outer(args: Namespace, **settings: Any) -> SlowMoConfig:
    """Return SlowMo's configuration from the options; `settings` adds gossip or averaged gradients."""
    return SlowMoConfig(tau=args.tau, alpha=args.alpha, beta=args.beta, inner_state=args.inner_state, **settings)


# The methods that can be compared, each as a function from the options to a configuration.
METHODS: dict[str, Callable[[Namespace], SlowMoConfig]] = {
    "ar-sgd": lambda args: SlowMoConfig.ar_sgd(),
    "local-sgd": lambda args: SlowMoConfig.local_sgd(args.tau, inner_state=args.inner_state),
    "slowmo": outer,
    "slowmo-ar-sgd": lambda args: outer(args, gradients="all"),
    "d-psgd": lambda args: SlowMoConfig.dpsgd(),
    "slowmo-d-psgd": lambda args: outer(args, gossip=DPSGD()),
    "sgp": lambda args: SlowMoConfig.sgp(),
    "slowmo-sgp": lambda args: outer(args, gossip=SGP()),
    "slowmo-sgp-noaverage": lambda args: outer(args, gossip=SGP(), average=False),
    "osgp": lambda args: SlowMoConfig.osgp(),
    "slowmo-osgp": lambda args: outer(args, gossip=SGP(overlap=True)),
}

# Okabe and Ito's colours, which are safe for colour-blind readers, and line styles for black-and-white print. Each
# gossip method has one colour: dashed without SlowMo, solid with it.
STYLES = {
    "ar-sgd": ("#000000", "-"),
    "local-sgd": ("#D55E00", "--"),
    "slowmo": ("#0072B2", "-."),
    "slowmo-ar-sgd": ("#000000", "-."),
    "d-psgd": ("#E69F00", "--"),
    "slowmo-d-psgd": ("#E69F00", "-"),
    "sgp": ("#009E73", "--"),
    "slowmo-sgp": ("#009E73", "-"),
    "slowmo-sgp-noaverage": ("#56B4E9", "-"),
    "osgp": ("#CC79A7", "--"),
    "slowmo-osgp": ("#CC79A7", "-"),
}

Add = Callable[..., Any]
"""`ArgumentParser.add_argument`."""


def add_method_options(add: Add, *, methods: Sequence[str], seeds: int, tau: int = 12, inner_state: str) -> None:
    """Add the options that all examples share: methods, seeds, SlowMo's settings, and where results go."""
    add("--methods", nargs="+", choices=METHODS, default=list(methods), metavar="METHOD", help=", ".join(METHODS))
    add("--seeds", type=int, default=seeds, help="number of runs of each method, each with a different seed")
    add("--first-seed", type=int, default=0, help="seed of the first run; later runs count up from it")
    add(
        "--inner-state",
        choices=("maintain", "reset", "average"),
        default=inner_state,
        help="the inner optimizer's momentum at the start of a block of tau steps",
    )
    add("--tau", type=int, default=tau, help="steps between two averages of the models")
    add("--alpha", type=float, default=1.0, help="SlowMo's slow learning rate")
    add("--beta", type=float, default=0.5, help="SlowMo's slow momentum")
    add("--out", type=Path, default=Path("results"), help="directory for the results and the figure")
    add("--logdir", type=Path, help="write the metrics of every outer step to TensorBoard files in this directory")


def add_resume_options(add: Add) -> None:
    """Add the option of the examples that train for hours."""
    add(
        "--checkpoints",
        type=Path,
        help="directory of checkpoints: the job saves there after every epoch, and continues from there when the same "
        "command starts it again",
    )


def peek(option: str, arguments: Sequence[str] | None) -> str | None:
    """Return the value of an option on which the defaults of others depend."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="value")
    value: str | None = parser.parse_known_args(arguments)[0].value
    return value


def make_parser(description: str | None) -> ArgumentParser:
    """Return a parser whose help says all defaults."""
    return ArgumentParser(description=description, formatter_class=ArgumentDefaultsHelpFormatter)


def parse(parser: ArgumentParser, rank: int, arguments: Sequence[str] | None) -> Namespace:
    """Parse the command line. Only rank 0 prints the help."""
    with redirect_stdout(StringIO() if rank else sys.stdout):
        return parser.parse_args(arguments)


@dataclass
class Run:
    """Results of one run of one method."""

    method: str
    seed: int
    steps: list[int] = field(default_factory=list)  # step counts at which the curves have points
    loss: list[float] = field(default_factory=list)  # training loss since the previous point, mean over the workers
    score: list[float] = field(default_factory=list)  # of the workers' mean model on the test data
    ms_per_step: float = 0.0  # training only, mean over the workers
    mb_sent: float = 0.0  # 10^6 bytes handed to the transport per worker, without start and evaluation
    ms_between: float = 0.0  # per step without an average, where measured
    metrics: list[Metrics] = field(default_factory=list)  # of each outer step on this worker, where measured

    def add(self, step: int, *, loss: float, ms: float, mb: float) -> None:
        """Add an epoch: its last step, the mean loss, the mean time of a step, and the traffic."""
        self.steps.append(step)
        self.loss.append(loss)
        self.ms_per_step += (ms - self.ms_per_step) / len(self.steps)
        self.mb_sent += mb


def table(runs: Sequence[Run], measure: str) -> str:
    """Return the results as text, one line per method."""
    lines = [f"{'method':<21}{measure:>18}{'ms per step':>14}{'MB sent per worker':>21}"]
    for method, mine in by_method(runs).items():
        last = [run.score[-1] for run in mine]
        score = f"{np.mean(last):.1f}" + (f" ± {np.std(last, ddof=1):.1f}" if len(last) > 1 else "")
        # The median ignores a run during which the machine was busy with something else.
        speed, sent = np.median([run.ms_per_step for run in mine]), np.mean([run.mb_sent for run in mine])
        lines.append(f"{method:<21}{score:>18}{speed:>14.2f}{sent:>21.2f}")
    return "\n".join(lines)


def draw_figure(runs: Sequence[Run], title: str, measure: str, path: Path) -> None:
    """Plot loss and score over the steps: the mean over the seeds and a band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for method, mine in by_method(runs).items():
        colour, line = STYLES[method]
        for axis, curves in zip(axes, ([run.loss for run in mine], [run.score for run in mine]), strict=True):
            mean, spread = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=1 if len(curves) > 1 else 0)
            axis.plot(mine[0].steps, mean, line, marker=".", color=colour, label=method)
            axis.fill_between(mine[0].steps, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    axes[0].set(xlabel="step", ylabel="training loss of the workers' own models (nats)", yscale="log")
    axes[1].set(xlabel="step", ylabel=f"{measure} (of the workers' mean model)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def by_method(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group the runs by method, in order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


def report(
    name: str, args: Namespace, runs: Sequence[Run], workers: int, *, task: str, measure: str = "test accuracy, %"
) -> None:
    """Print the table, and write NAME.json and NAME.png to the directory `args.out`."""
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    results = {"workers": workers, "settings": settings, "runs": [asdict(run) for run in runs]}
    (args.out / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    seeds = f"{args.seeds} seeds (bands: ± standard deviation)" if args.seeds > 1 else f"seed {args.first_seed}"
    draw_figure(
        runs,
        f"{task} on {workers} {'worker' if workers == 1 else 'workers'}: τ = {args.tau}, α = {args.alpha:g}, "
        f"β = {args.beta:g}, inner state {args.inner_state}, {seeds}",
        measure,
        args.out / f"{name}.png",
    )
    print(f"\n{table(runs, measure)}\n\nWritten: {args.out / name}.json, {args.out / name}.png", flush=True)
