"""Compare what a first `fit` costs with SlowMo and without: Keras and TensorFlow trace, and optimize what they traced.

    python benchmarks/tracing_keras.py                 # one worker, and two with Horovod
    python benchmarks/tracing_keras.py --rounds 9 --methods "SGD" "SlowMo"
    python benchmarks/tracing_keras.py --rounds 3 --methods "SGD" "SlowMo, 2 workers" "12 fragments, 2 workers" \
        "12 fragments, 8 bits, 2 workers"

Each figure is of a process of its own: one batch through a network of seven convolutions and two dense layers, and the
end of the epoch, where SlowMoCallback joins. CPU time, since other processes change the time on a clock, and memory
does not matter. The methods take turns.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import subprocess
import sys
import time
from typing import Any

STREAMED = {"fragments": 12, "delay": 1}
METHODS: dict[str, tuple[int, dict[str, int]]] = {
    "SGD": (1, {}),
    "SlowMo": (1, {}),
    "SlowMo, 2 workers": (2, {}),
    "12 fragments, 2 workers": (2, STREAMED),
    "12 fragments, 8 bits, 2 workers": (2, {**STREAMED, "bits": 8}),
}
"""Number of workers and settings of each."""
USUAL = ("SGD", "SlowMo", "SlowMo, 2 workers")
SECONDS, NODES = "until the first step is done", "nodes"


def network() -> Any:
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    convolutions = [layers.Conv2D(width, 3, padding="same", activation="relu") for width in (8, 8, 16, 16, 32, 32, 32)]
    dense = [layers.GlobalAveragePooling2D(), layers.Dense(32, "relu"), layers.Dense(10)]
    return keras.Sequential([keras.Input((16, 16, 3)), *convolutions, *dense])


def nodes_of(function: Any) -> int:
    """Return the number of nodes in the graph of a traced function, and in all functions that it calls."""
    graph = function.graph.as_graph_def()
    return len(graph.node) + sum(len(each.node_def) for each in graph.library.function)


def measure(method: str) -> dict[str, float]:
    """Return the CPU seconds of a first fit and of its first step, and the number of nodes of its train function."""
    import keras
    import numpy as np

    from hvd_slowmo.tf import SlowMo, SlowMoCallback, SlowMoConfig

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.stepped = time.process_time()

    workers, settings = METHODS[method]
    if workers > 1:
        import horovod.tensorflow as hvd

        hvd.init()
    model, clock = network(), Clock()
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    plain = method == "SGD"
    model.compile(optimizer if plain else SlowMo(optimizer, SlowMoConfig(tau=12, **settings)), "mse", jit_compile=False)
    x, y = np.zeros((32, 16, 16, 3), np.float32), np.zeros((32, 10), np.float32)
    started = time.process_time()
    model.fit(x, y, batch_size=32, verbose=0, callbacks=[clock] if plain else [clock, SlowMoCallback()])
    ended = time.process_time()
    function = getattr(model.train_function, "args", [model.train_function])[0]  # the callback has wrapped it
    train = inspect.getclosurevars(function).nonlocals["multi_step_on_iterator"]
    found = [nodes_of(each) for each in train._list_all_concrete_functions()]
    return {SECONDS: clock.stepped - started, "with the epoch's end": ended - started, NODES: sum(found)}


def measured(method: str) -> dict[str, float]:
    """Return the result of new processes, that of one of them."""
    command = [sys.executable, __file__, "--of", method]
    workers, _ = METHODS[method]
    if workers > 1:
        command = ["hvd-slowmo", "run", "-np", str(workers), *command]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line[line.index("{") :] for line in output.splitlines() if f'"{NODES}"' in line]
    result: dict[str, float] = json.loads(lines[0])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="processes per method")
    parser.add_argument("--methods", nargs="+", default=USUAL, choices=METHODS, metavar="METHOD", help="SGD first")
    parser.add_argument("--of", choices=METHODS, help="measure one method in this process")
    args = parser.parse_args()
    if args.of:
        print(json.dumps(measure(args.of)), flush=True)
        return
    rounds = [{method: measured(method) for method in args.methods} for _ in range(args.rounds)]
    medians = {m: {key: statistics.median(r[m][key] for r in rounds) for key in rounds[0][m]} for m in args.methods}
    first = medians[args.methods[0]]
    for key, least in first.items():
        ratios = [f"{m} {found[key]:.4g} ({found[key] / least:.2f} x)" for m, found in medians.items()]
        print(f"{'nodes of the train function' if key == NODES else f'CPU seconds {key}'}: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
