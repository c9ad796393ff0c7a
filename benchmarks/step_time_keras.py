"""Compare the time of a Keras step under SlowMo and its alternatives; the methods take turns in one run.

    make bench                                                     # together with step_time.py
    horovodrun -np 2 python benchmarks/step_time_keras.py          # the network as it is
    python benchmarks/step_time_keras.py --inner                   # one worker: the cost of an inner step

Model, batch and measurement are those of step_time.py; the scripts are separate since a process can load either
PyTorch's or TensorFlow's Horovod. A step is one call of a tf.function with forward and backward. Horovod's Keras
DistributedOptimizer is left out, since it does not communicate under Keras 3; DistributedGradientTape in a custom
training loop does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf
import turns

from hvd_slowmo.tf import SlowMo, SlowMoConfig

TAPE = "Horovod DistributedGradientTape"
Wrap = Callable[[keras.optimizers.Optimizer], keras.optimizers.Optimizer]


def network(width: int = 4096) -> keras.Model:
    """Return a perceptron; the default width gives the 25.2 million parameters of step_time.py."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(width, "relu"), keras.layers.Dense(width - 64, "relu"), keras.layers.Dense(74)]
    return keras.Sequential([keras.Input((width // 2,)), *layers])


def waiting(milliseconds: float) -> Callable[[Any], Any]:
    """Return the identity after a wait, which TensorFlow neither folds nor orders with respect to the exchange."""

    def wait(x: Any) -> Any:
        time.sleep(milliseconds / 1e3)
        return x

    return lambda x: tf.ensure_shape(tf.numpy_function(wait, [x], x.dtype, stateful=False), x.shape)


def message(width: int) -> turns.Step:
    """Return a step that sends a gossip message on the topology "exponential", without computation."""
    x = tf.random.normal((network(width).count_params(),))
    splits = tf.one_hot((hvd.rank() + 1) % hvd.size(), hvd.size(), on_value=x.shape[0], off_value=0, dtype=tf.int32)
    send = tf.function(lambda: hvd.alltoall(x + tf.random.uniform(()), splits, name="message")[0][0])
    return lambda: send().numpy()


def training(
    wrap: Wrap, tape_of: Callable[[Any], Any] = lambda tape: tape, width: int = 4096, pause: float | None = None
) -> turns.Step:
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
    gradients = [tf.random.normal(v.shape, stddev=1e-3) for v in model.trainable_variables]

    @tf.function
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        tape = tape_of(tape)
        variables = [v.value for v in model.trainable_variables]
        optimizer.apply(tape.gradient(loss, variables), model.trainable_variables)
        return loss

    @tf.function
    def paused(x: Any) -> Any:  # a device computes while the host's cores are idle
        late = waiting(pause or 0.0)(x)[0, 0]
        with tf.control_dependencies([late]):
            mine = [tf.identity(g) for g in gradients]
        # A device would be busy until then. TensorFlow would multiply momentum by its factor beside the wait, on a core
        # that is idle in this benchmark only. SlowMo's step begins with the gradients by itself.
        with tf.control_dependencies([] if isinstance(optimizer, SlowMo) else [late]):
            optimizer.apply(mine, model.trainable_variables)
        return late

    return (lambda: step(x, y).numpy()) if pause is None else lambda: paused(x).numpy()


def horovod_tape(**options: Any) -> turns.Step:
    return training(lambda optimizer: optimizer, hvd.DistributedGradientTape, **options)


def ours(config: SlowMoConfig, name: str, **options: Any) -> turns.Step:
    return training(lambda optimizer: SlowMo(optimizer, config, name=name), **options)


def methods(tau_gossip: int) -> dict[str, Callable[..., turns.Step]]:
    mine = {name: partial(ours, *setting) for name, setting in turns.ours(tau_gossip).items()}
    return {turns.ALONE: partial(training, lambda optimizer: optimizer), TAPE: horovod_tape, **mine}


def barrier() -> None:
    hvd.allreduce(tf.zeros(1)).numpy()


def inner(repeats: int = 2000) -> None:
    """Measure the cost of SlowMo's branches and counters between outer steps, with a small model."""
    plain = training(lambda optimizer: optimizer, width=128)
    wrapped = ours(SlowMoConfig(tau=10**9), "inner", width=128)
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
    """Print the floating-point elements that SlowMo keeps in addition to parameters and inner state."""
    model = network(128)
    optimizer = SlowMo(keras.optimizers.SGD(0.01, momentum=0.9), SlowMoConfig(tau=turns.TAU))
    optimizer.build(model.trainable_variables)
    inner_ones = {id(v) for v in optimizer.inner_optimizer.variables}
    kept = sum(v.value.shape.num_elements() for v in optimizer.variables if id(v) not in inner_ones)
    parameters = model.count_params()
    print(f"SlowMo keeps {kept:,} elements for {parameters:,} parameters: {kept / parameters:.3f} x")


def main() -> None:
    parser = turns.options(__doc__, [turns.ALONE, TAPE])
    parser.add_argument("--inner", action="store_true", help="one worker: measure an inner step and the memory")
    args = parser.parse_args()
    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    width = 4096 // args.shrink

    def make(name: str) -> turns.Step:
        if name == turns.MESSAGE:
            return message(width)
        return methods(args.tau_gossip)[name](width=width, pause=args.pause)

    if args.inner:
        inner()
        memory()
    else:
        turns.run(args, make, barrier, hvd.rank(), hvd.size())


if __name__ == "__main__":
    main()
