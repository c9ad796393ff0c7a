"""A Keras worker of an elastic job: it trains with fit, and one is killed. Each writes what it has seen to a file.

usage: train_keras.py DIRECTORY EPOCHS VICTIM KILL_STEP [SETTING=VALUE ...]
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import horovod.tensorflow as hvd
import keras
import numpy as np

import hvd_slowmo.tf as slowmo

directory, epochs, victim, kill_step = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
settings = {name: json.loads(value) for name, value in (pair.split("=") for pair in sys.argv[5:])}
if "gossip" in settings:
    settings["gossip"] = slowmo.SGP(overlap=settings["gossip"] == "OSGP")
slowmo.init()
host = os.environ["HOROVOD_HOSTNAME"]
keras.utils.set_random_seed(hvd.rank())
model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, "tanh"), keras.layers.Dense(1)])
model.compile(slowmo.SlowMo(keras.optimizers.SGD(0.01, momentum=0.9), **settings), "mse")
target = np.sin(np.arange(64.0))
calls = []


class Fault(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        step = model.optimizer.steps
        if host == victim and step >= kill_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if hvd.rank() == 0 and step >= kill_step and (directory / "hosts.next").exists():
            (directory / "hosts.next").rename(directory / "hosts")
        time.sleep(0.02)


@slowmo.elastic.run
def train(state):
    rng = np.random.default_rng(hvd.rank())
    x = rng.standard_normal((16 * 30, 64))
    calls.append((state.epoch, state.optimizer.steps))
    saved = slowmo.Checkpoints(directory / "saved") if "CHECKPOINTS" in os.environ else None
    history = state.model.fit(
        x,
        x @ target,
        batch_size=16,
        initial_epoch=state.epoch,
        epochs=epochs,
        verbose=0,
        callbacks=[slowmo.SlowMoCallback(state=state, checkpoints=saved), Fault()],
    )
    return history.history["loss"][-1], history.epoch


state = slowmo.elastic.State(model, epoch=0)
loss, trained = train(state)
seen = {
    "host": host,
    "rank": hvd.rank(),
    "size": hvd.size(),
    "steps": model.optimizer.steps,
    "epoch": state.epoch,
    "loss": loss,
    "epochs": trained,
    "parameters": [float(np.float64(v.numpy()).sum()).hex() for v in model.trainable_variables],
    "changes": [change._asdict() for change in state.changes],
    "calls": calls,
}
(directory / f"{host}.json").write_text(json.dumps(seen))
