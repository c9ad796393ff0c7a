"""A worker of an elastic job of both frameworks, Keras on the host 127.0.0.1; one is killed. Each writes what it saw.

usage: train_mixed.py DIRECTORY EPOCHS VICTIM KILL_STEP [SETTING=VALUE ...]
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

directory, epochs, victim, kill_step = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
settings = {name: json.loads(value) for name, value in (pair.split("=") for pair in sys.argv[5:])}
host = os.environ["HOROVOD_HOSTNAME"]
target = np.sin(np.arange(64.0)).astype(np.float32)[:, None]
calls = []


def data(rank):
    x = np.random.default_rng(rank).standard_normal((16 * 30, 64)).astype(np.float32)
    return x, x @ target


def after_step(steps, rank):
    if host == victim and steps >= kill_step:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0 and steps >= kill_step and (directory / "hosts.next").exists():
        (directory / "hosts.next").rename(directory / "hosts")
    time.sleep(0.02)


def in_keras():
    import horovod.tensorflow as hvd
    import keras

    import hvd_slowmo.tf as slowmo

    slowmo.init()
    keras.utils.set_random_seed(hvd.rank())
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, "tanh"), keras.layers.Dense(1)])
    inner = keras.optimizers.SGD(0.01, momentum=0.9)
    model.compile(slowmo.SlowMo(inner, parameter_map=slowmo.ParameterMap(), **settings), "mse")

    class Fault(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            after_step(model.optimizer.steps, hvd.rank())

    @slowmo.elastic.run
    def train(state):
        calls.append((state.epoch, state.optimizer.steps))
        x, y = data(hvd.rank())
        callbacks = [slowmo.SlowMoCallback(state=state), Fault()]
        state.model.fit(x, y, batch_size=16, initial_epoch=state.epoch, epochs=epochs, verbose=0, callbacks=callbacks)
        return float(np.mean((state.model(x).numpy() - y) ** 2))

    state = slowmo.elastic.State(model, epoch=0)
    loss = train(state)
    return state, loss, [v.numpy() for v in model.trainable_variables], hvd


def in_pytorch():
    import torch

    import hvd_slowmo.torch as slowmo

    slowmo.init()
    torch.manual_seed(slowmo.rank())
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer = slowmo.SlowMo(inner, model, slowmo.SlowMoConfig(**settings), parameter_map=slowmo.ParameterMap())

    @slowmo.elastic.run
    def train(state):
        calls.append((state.epoch, optimizer.steps))
        x, y = (torch.from_numpy(each) for each in data(slowmo.rank()))
        while state.epoch < epochs:
            for first in range(0, len(x), 16):
                optimizer.zero_grad()
                (model(x[first : first + 16]) - y[first : first + 16]).square().mean().backward()
                optimizer.step()
                after_step(optimizer.steps, slowmo.rank())
                state.commit()
            optimizer.join()
            state.epoch += 1
        optimizer.join(leaving=True)  # as Keras at the end of fit
        with torch.no_grad():
            return (model(x) - y).square().mean().item()

    state = slowmo.elastic.State(model, optimizer, epoch=0)
    loss = train(state)
    return state, loss, [p.detach().numpy().T for p in model.parameters()], slowmo


state, loss, parameters, workers = in_keras() if host == "127.0.0.1" else in_pytorch()
seen = {
    "host": host,
    "rank": workers.rank(),
    "size": workers.size(),
    "steps": state.optimizer.steps,
    "epoch": state.epoch,
    "loss": loss,
    "parameters": [float(each.astype(np.float64).sum()).hex() for each in parameters],
    "changes": [change._asdict() for change in state.changes],
    "calls": calls,
}
(directory / f"{host}.json").write_text(json.dumps(seen))
