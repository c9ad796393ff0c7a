"""What a step costs under Keras: ours against what a user would pick instead, in one run, the methods in turn.

    make bench                                                     # with step_time.py, of which this is the other half
    horovodrun -np 2 python benchmarks/step_time_keras.py          # this network as it is
    python benchmarks/step_time_keras.py --inner                   # one worker: what an inner step's branch costs

The model, the batch and the measurement are step_time.py's; a process has one Horovod, PyTorch's or TensorFlow's. Each
step is one call of a tf.function, forward and backward. Horovod's own Keras DistributedOptimizer is missing: on Keras 3
it trains without communicating. DistributedGradientTape in a loop of one's own is what works.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
import turns

from hvd_slowmo.tf import SlowMo, SlowMoConfig

TAU = turns.TAU
Wrap = Callable[[keras.optimizers.Optimizer], keras.optimizers.Optimizer]


def network(width: int = 4096) -> keras.Model:
    """A perceptron; 25.2 million parameters if it is as wide as step_time.py's."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(width, "relu"), keras.layers.Dense(width - 64, "relu"), keras.layers.Dense(74)]
    return keras.Sequential([keras.Input((width // 2,)), *layers])


def training(wrap: Wrap, tape_of: Callable[[Any], Any] = lambda tape: tape, width: int = 4096) -> turns.Step:
    model = network(width)
    optimizer = wrap(keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True))
    if isinstance(optimizer, SlowMo):
        optimizer.broadcast(model.variables)
    else:
        optimizer.build(model.trainable_variables)
        if hvd.size() > 1:
            hvd.broadcast_variables([v.value for v in model.variables], root_rank=0)
    x = tf.random.normal((32, width // 2), seed=hvd.rank())
    y = tf.random.uniform((32,), maxval=74, dtype=tf.int32, seed=hvd.rank())
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        tape = tape_of(tape)
        variables = [v.value for v in model.trainable_variables]
        optimizer.apply(tape.gradient(loss, variables), model.trainable_variables)
        return loss

    return lambda: step().numpy()


def ours(config: SlowMoConfig, name: str) -> Wrap:
    return lambda base: SlowMo(base, config, name=name)


METHODS: dict[str, Callable[[], turns.Step]] = {
    turns.ALONE: lambda: training(lambda base: base),
    "Horovod DistributedGradientTape": lambda: training(lambda base: base, hvd.DistributedGradientTape),
    "ours, Keras: Local SGD": lambda: training(ours(SlowMoConfig.local_sgd(TAU), "local")),
    "ours, Keras: SlowMo": lambda: training(ours(SlowMoConfig(tau=TAU), "slowmo")),
    "ours, Keras: AR-SGD": lambda: training(ours(SlowMoConfig.ar_sgd(), "all")),
}


def barrier() -> None:
    hvd.allreduce(tf.zeros(1)).numpy()


def inner(repeats: int = 2000) -> None:
    """What stays of SlowMo where no outer step comes: its branches and counters, with a small model."""
    plain = training(lambda base: base, width=128)
    wrapped = training(ours(SlowMoConfig(tau=10**9), "inner"), width=128)
    extra = []
    for number in range(10):
        seconds = []
        for step in (plain, wrapped):
            started = time.perf_counter()
            for _ in range(repeats // 10):
                step()
            seconds.append((time.perf_counter() - started) / (repeats // 10))
        if number:  # the first warms up
            extra.append(seconds)
    alone, ours_too = (statistics.median(each) for each in zip(*extra, strict=True))
    print(
        f"a step of {1e6 * alone:.0f} µs takes {1e6 * (ours_too - alone):.0f} µs more with SlowMo between outer steps"
    )


def memory() -> None:
    """Floating-point elements kept beside the parameters and the inner optimizer's own."""
    model = network(128)
    optimizer = SlowMo(keras.optimizers.SGD(0.01, momentum=0.9), SlowMoConfig(tau=TAU))
    optimizer.build(model.trainable_variables)
    inner_ones = {id(v) for v in optimizer.inner_optimizer.variables}
    kept = sum(v.value.shape.num_elements() for v in optimizer.variables if id(v) not in inner_ones)
    parameters = model.count_params()
    print(f"SlowMo keeps {kept:,} elements for {parameters:,} parameters: {kept / parameters:.3f} x")


def main() -> None:
    parser = turns.options(__doc__, METHODS)
    parser.add_argument("--inner", action="store_true", help="one worker: the cost of an inner step, and the memory")
    args = parser.parse_args()
    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    if args.inner:
        inner()
        memory()
    else:
        turns.run(hvd, args, lambda name: METHODS[name](), barrier)


if __name__ == "__main__":
    main()
