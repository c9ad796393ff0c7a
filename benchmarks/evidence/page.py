"""docs/evidence.md and its figures, from the results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from scipy.stats import t as student

from evidence import theorem, translation
from evidence.results import Results, paired, spread
from evidence.studies import METHODS, STUDIES, TRANSLATION_METHODS, Plan, Translation, with_slowmo
from hvd_slowmo import SlowMoConfig
from hvd_slowmo.advice.cost import Job, cost
from hvd_slowmo.advice.link import link_of
from hvd_slowmo.advice.training import training_of

LINKS = {"1 Gbit/s": 125e6, "10 Gbit/s": 1.25e9}
PARAMETERS, STEP_S, LATENCY_S = 25_200_000, 0.18, 0.0002  # of the step times, which are a model's

Table = list[Sequence[str]]

Translated = tuple[Results, dict[str, float]]
"""Results of the translation, and the learning rate of each method."""


def accuracies(results: Results, cell: str, workers: int) -> list[float]:
    return [values[0] for values in results.of(cell, workers)]


def markdown(table: Table) -> str:
    """Return a table; its first row is the head."""
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(values: Sequence[float], base: Sequence[float], unit: str = "points") -> str:
    """Return whether a gain is shown: the 95 % interval of the paired difference (Student's t) excludes 0."""
    apart = [a - b for a, b in zip(values, base, strict=False)]
    if len(apart) < 2:
        return "one seed shows nothing"
    error = statistics.stdev(apart) / len(apart) ** 0.5
    mean = statistics.mean(apart)
    reach = float(student.ppf(0.975, len(apart) - 1)) * error
    found = "shown" if mean > reach else "against it" if mean < -reach else "not shown"
    return f"{found} ({paired(values, base)} {unit})"


def methods_section(results: Results, plan: Plan) -> Iterator[str]:
    yield "## The methods, alone and with SlowMo\n"
    for workers in plan.workers:
        table: Table = [["method", "alone, %", "with SlowMo, %", "difference, points", "a gain is"]]
        for method in METHODS:
            alone, slow = (accuracies(results, name, workers) for name in (method, with_slowmo(method)))
            gain = verdict(slow, alone).split(" (")[0]
            table.append([method, spread(alone), spread(slow), paired(slow, alone), gain])
        yield f"{workers} workers:\n\n{markdown(table)}\n"


def questions_section(methods: Results, buffers: Results, plan: Plan) -> Iterator[str]:
    yield "## The paper's questions\n"
    for workers in plan.workers:
        slow = accuracies(methods, with_slowmo("Local SGD"), workers)
        yield f"With {workers} workers:\n"
        for base in ("Local SGD", "SGP", "OSGP"):
            found = verdict(accuracies(methods, with_slowmo(base), workers), accuracies(methods, base, workers))
            yield f"- SlowMo improves {base}: {found}."
        for other in ("AR-SGD", "SGP", "OSGP"):
            found = verdict(slow, accuracies(methods, other, workers))
            yield f"- SlowMo over Local SGD is better than {other}: {found}."
        yield ""
    without, exact = (accuracies(buffers, f"SGP, {name}", plan.workers[0]) for name in ("noaverage", "average"))
    where = f"with {plan.workers[0]} workers"
    yield f"- SGP with SlowMo gains without the exact average, {where}: {verdict(without, exact)}.\n"


def theorem_section(results: Results) -> Iterator[str]:
    yield "## The theorem\n"
    table: Table = [["", "against the steps", "against the workers", "promised"]]
    for beta in ("β = 0", "β = 0.6"):
        found = [theorem.slope(*zip(*points, strict=True)) for points in curves(results, beta)]
        table.append([beta, *(f"{each.value:.3f} ± {each.error:.3f}" for each in found), "-1/2"])
    yield markdown(table)
    yield "\nSlopes of the mean squared gradient norm with their standard errors.\n"
    yield "![Mean squared gradient norm over steps and workers](evidence_theorem.png)\n"


def translation_section(translated: Translated | None, study: Translation | None, command: str) -> Iterator[str]:
    """The table of the translation, its verdicts, and how it was made."""
    yield "## Translation\n"
    if translated is None or study is None:
        yield f"Left out by `{command}`: it takes too long.\n"
        return
    results, rates = translated

    def values(cell: str, column: int) -> list[float]:
        return [run[column] for run in results.of(cell, study.workers)]

    yield (
        "Verses of the Bible from the English of 1611 into Basic English, of at most "
        f"{translation.WORDS} words, {translation.PIECES:,} pieces, split by chapters; a transformer of width "
        f"{translation.WIDTH} with {translation.LAYERS} layer each in encoder and decoder. {study.workers} workers, "
        f"{translation.SENTENCES} verses per worker and step, {study.steps:,} steps, Adam with its state maintained, "
        f"the paper's schedule with {translation.WARMUP} steps of warm-up, and its label smoothing. "
        f"{study.seeds} seeds in every cell. BLEU (taking the most likely piece after the other) and loss (nats per "
        "piece) are those of the test's verses.\n"
    )
    tuned = ", ".join(f"{name}: {rate:g}" for name, rate in rates.items())
    yield (
        f"The rate was chosen among {', '.join(f'{rate:g}' for rate in study.rates)} by BLEU on the validation verses, "
        f"with {len(study.tuning_seeds)} other seed, the same budget for all: {tuned}.\n"
    )
    table: Table = [["method", "BLEU alone", "with SlowMo", "difference", "a gain is", "loss alone", "with SlowMo"]]
    for method in TRANSLATION_METHODS:
        cells = method, with_slowmo(method)
        alone, slow = (values(cell, 0) for cell in cells)
        gain = verdict(slow, alone).split(" (")[0]
        losses = (spread(values(cell, 1), 2) for cell in cells)
        table.append([method, spread(alone), spread(slow), paired(slow, alone), gain, *losses])
    yield markdown(table) + "\n"
    for method in TRANSLATION_METHODS:
        yield f"- SlowMo improves {method}: {verdict(values(with_slowmo(method), 0), values(method, 0), 'BLEU')}."
    slow = with_slowmo("Local Adam")
    for other in ("AR-Adam", "SGP with Adam"):
        found = verdict(values(slow, 0), values(other, 0), "BLEU")
        yield f"- SlowMo over Local Adam is better than {other}: {found}."
    yield ""


def curves(results: Results, beta: str) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Return the means over the seeds, over the steps and over the workers."""
    found: dict[tuple[int, int], list[float]] = {}
    for key, row in results.rows.items():
        if key.cell == beta:
            found.setdefault((key.workers, key.steps), []).append(row.values[0])
    means = {point: statistics.mean(values) for point, values in found.items()}
    half = sorted({steps for _, steps in means})[-2]
    over_steps = sorted((steps, mean) for (workers, steps), mean in means.items() if workers == 8)
    return over_steps, sorted((workers, mean) for (workers, steps), mean in means.items() if steps == half)


def milliseconds(tau: int, workers: int, rate: float) -> float:
    """Return the adviser's time of a step of SlowMo."""
    job = Job(training_of(parameters=PARAMETERS, seconds=STEP_S), link_of(rate, LATENCY_S, workers))
    return 1000 * cost(SlowMoConfig(tau=tau), job).seconds


def tau_section(results: Results, plan: Plan) -> Iterator[str]:
    yield "## τ\n"
    workers = plan.workers[0]
    table: Table = [["τ", "Local SGD, %", "SlowMo, %", "drift of SlowMo", *(f"ms, {link}" for link in LINKS)]]
    for tau in plan.taus:
        drift = [values[2] for values in results.of(f"SlowMo, τ = {tau}", workers)]
        times = [f"{milliseconds(tau, workers, rate):.0f}" for rate in LINKS.values()]
        cells = (spread(accuracies(results, f"{name}, τ = {tau}", workers)) for name in ("Local SGD", "SlowMo"))
        table.append([str(tau), *cells, spread(drift, 3) if tau > 1 else "0", *times])
    yield markdown(table)
    yield (
        f"\n{workers} workers. Milliseconds per step are those of [the adviser's model](advice.md) for "
        f"{PARAMETERS / 1e6:.1f} million parameters and {1000 * STEP_S:.0f} ms of computation.\n"
    )
    yield "![Accuracy, drift and time of a step over τ](evidence_tau.png)\n"


def plain_section(title: str, name: str, results: Results, plan: Plan) -> Iterator[str]:
    """A table of a cell per row, with a column for each number of workers."""
    yield f"## {title}\n"
    cells = list(STUDIES[name](plan))
    workers = sorted({cell.workers for cell in cells})
    table: Table = [["", *(f"{m} workers, %" for m in workers)]]
    for cell in dict.fromkeys(cell.name for cell in cells):
        table.append([cell, *(spread(accuracies(results, cell, m)) for m in workers)])
    yield markdown(table) + "\n"


def write(
    found: dict[str, Results],
    plan: Plan,
    rates: dict[tuple[str, int], float],
    translated: Translated | None,
    command: str,
    path: Path,
) -> None:
    """Write the page."""
    tuned = ", ".join(f"{name} on {workers}: {rate:g}" for (name, workers), rate in rates.items())
    edge = sum(rate in (min(plan.rates), max(plan.rates)) for rate in rates.values())
    sections = [
        "# Evidence\n",
        f"Written by `{command}`, from simulated workers ([simulator](simulator.md)). {plan.seeds} seeds in every "
        "cell: mean ± standard deviation. Differences are paired by the seed, mean ± standard error; a gain counts as "
        "shown where its 95 % interval excludes 0. The raw results lie beside this page, in `evidence/`.\n",
        "Images: 5,000 of MNIST (3,500 to train, 500 to choose the learning rate, 1,000 to test), a convolutional "
        f"network with BatchNorm of 9,098 parameters, 16 images per worker and step, {plan.steps} steps, Nesterov SGD "
        "with momentum 0.9, the rate at a tenth in the last fifth, τ = 12 and β = 0.5 unless a table says otherwise. "
        "This says nothing about large models.\n",
        f"The learning rate of each method was chosen among {', '.join(f'{rate:g}' for rate in plan.rates)} by "
        f"the validation images, with other seeds ({len(plan.tuning_seeds)}), the same budget for all: "
        f"{tuned}. {edge} of {len(rates)} are the smallest or the largest of these, and a better one may lie beyond.\n",
        *questions_section(found["methods"], found["buffers"], plan),
        *methods_section(found["methods"], plan),
        *translation_section(translated, plan.translation, command),
        *theorem_section(found["theorem"]),
        *tau_section(found["tau"], plan),
        *plain_section("β and the number of workers", "beta", found["beta"], plan),
        *plain_section("The inner state, and leaving out the average", "buffers", found["buffers"], plan),
        *plain_section("Streamed, late and few bits", "streaming", found["streaming"], plan),
        "Alike: every worker's images are drawn at random; apart: they are nearly sorted by class.\n",
    ]
    path.write_text("\n".join(sections), encoding="utf-8")


def figures(found: dict[str, Results], plan: Plan, folder: Path) -> None:
    """Draw the figures of the page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    _, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for beta, marker in (("β = 0", "o"), ("β = 0.6", "s")):
        for axis, points in zip(axes, curves(found["theorem"], beta), strict=True):
            axis.plot(*zip(*points, strict=True), marker=marker, label=beta)
    for axis, label in zip(axes, ("steps K, 8 workers", "workers m"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="mean squared gradient norm")
        axis.legend()
    plt.savefig(folder / "evidence_theorem.png", dpi=120)
    plt.close()

    workers = plan.workers[0]
    _, axes = plt.subplots(1, 3, figsize=(13, 3.5), layout="constrained")
    for name, style in (("Local SGD", "--"), ("SlowMo", "-")):
        cells = [found["tau"].of(f"{name}, τ = {tau}", workers) for tau in plan.taus]
        for axis, column in zip(axes, (0, 2), strict=False):
            values = [[run[column] for run in cell] for cell in cells]
            axis.errorbar(
                plan.taus,
                [statistics.mean(v) for v in values],
                yerr=[statistics.stdev(v) if len(v) > 1 else 0 for v in values],
                linestyle=style,
                capsize=3,
                label=name,
            )
    for link, rate in LINKS.items():
        axes[2].plot(plan.taus, [milliseconds(tau, workers, rate) for tau in plan.taus], label=link)
    axes[0].set(ylabel="test accuracy, %")
    axes[1].set(ylabel="drift before an outer step")
    axes[2].set(ylabel="ms per step (model)")
    for axis in axes:
        axis.set(xscale="log", xlabel="τ")
        axis.set_xticks(plan.taus, [str(tau) for tau in plan.taus])
        axis.minorticks_off()
        axis.legend()
        axis.grid(alpha=0.3)
    plt.savefig(folder / "evidence_tau.png", dpi=120)
    plt.close()
