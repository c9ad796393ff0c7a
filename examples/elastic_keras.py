"""A job whose workers come and go: scikit-learn's handwritten digits, with Keras' fit.

Run it with: horovodrun -np 2 --min-np 1 --max-np 4 --host-discovery-script ./discover.sh \
    python examples/elastic_keras.py
`make demo-elastic FRAMEWORK=tf` does it on this machine, kills a worker, adds one, and draws the loss.
"""

import argparse
import json
import os
import time
from pathlib import Path

import digits_common as common
import horovod.tensorflow as hvd
import keras
import tensorflow as tf

import hvd_slowmo.tf as slowmo


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
tf.config.threading.set_intra_op_parallelism_threads(1)  # several workers share this machine's cores
keras.utils.set_random_seed(0)
images, classes, test_images, test_classes = common.load()
model = keras.Sequential(
    [keras.Input(images.shape[1:]), keras.layers.Flatten(), keras.layers.Dense(128, "relu"), keras.layers.Dense(10)]
)
inner = keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(slowmo.SlowMo(inner, tau=args.tau, beta=0.5), loss, metrics=["accuracy"])


def log(**entry: object) -> None:
    """Append an entry to this worker's file."""
    if args.record is not None:
        with (args.record / f"{os.environ.get('HOROVOD_HOSTNAME', 'alone')}.jsonl").open("a") as file:
            print(json.dumps({"time": time.time(), **entry}), file=file)


class Record(keras.callbacks.Callback):
    """Records the loss of each step: `logs` has the mean since the begin of the epoch."""

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        time.sleep(args.pause)
        log(step=self.model.optimizer.steps, loss=logs["loss"])


@slowmo.elastic.run
def train(state: slowmo.elastic.State) -> None:
    change = state.changes[-1]
    log(process=os.getpid(), **change._asdict())
    if hvd.rank() == 0:
        print(f"step {change.step}: {change.workers} workers, {change.seconds:.1f} s to come together", flush=True)
    # Every worker trains on its own part, which is another one when the workers have changed.
    part = slice(hvd.rank(), len(images) // hvd.size() * hvd.size(), hvd.size())
    state.model.fit(
        images[part],
        classes[part],
        batch_size=args.batch_size,
        initial_epoch=state.epoch,
        epochs=args.epochs,
        verbose=0,
        callbacks=[slowmo.SlowMoCallback(state=state), Record()],
    )


train(slowmo.elastic.State(model, epoch=0))
if hvd.rank() == 0:
    _, accuracy = model.evaluate(test_images, test_classes, verbose=0)
    print(f"test accuracy {100 * accuracy:.1f} % after {model.optimizer.steps} steps, {hvd.size()} workers at the end")
