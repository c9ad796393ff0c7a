"""Draw the time of a step over the bandwidth of the link, from the results of step_time.py.

python benchmarks/bandwidth_figure.py RESULTS FIGURE     # see bandwidth.sh
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

MBIT = {"1gbit": 1000, "250mbit": 250, "100mbit": 100}
NAMES = {
    "Horovod DistributedOptimizer": "Horovod's DistributedOptimizer",
    "PyTorch PostLocalSGD": "PyTorch's PostLocalSGD, period 12",
    "ours: SlowMo": "SlowMo, tau = 12",
    "ours: SlowMo, streamed": "SlowMo, streamed, 32 bits",
    "ours: SlowMo, streamed, 8 bits, 1 late": "SlowMoConfig.streaming(12)",
    "no communication": "no communication",
}


def main() -> None:
    results, figure = map(Path, sys.argv[1:3])
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    axes = plt.subplots(figsize=(7, 4.2))[1]
    for method, name in NAMES.items():
        found: dict[int, float] = {}
        for row in rows:
            if row["method"] == method:
                found.setdefault(MBIT[row["network"].split(",")[0]], 1e3 * row["s"])  # the longest run comes first
        style = {"color": "0.5", "linestyle": "--"} if method == "no communication" else {"marker": "o"}
        axes.plot(sorted(found), [found[rate] for rate in sorted(found)], label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="bandwidth of the link, Mbit/s", ylabel="time of a step, ms")
    axes.set_xticks(sorted(MBIT.values()), [str(rate) for rate in sorted(MBIT.values())])
    axes.minorticks_off()
    axes.set_yticks(
        [200, 500, 1000, 2000, 5000, 10000, 20000], ["200", "500", "1,000", "2,000", "5,000", "10,000", "20,000"]
    )
    axes.set_title("25.2 million parameters, 2 workers on one link, 130 ms of waiting per step", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(figure, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    main()
