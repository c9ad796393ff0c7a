"""A Keras worker of an elastic job with a training loop and a tf.function of its own; one is killed.

usage: loop_keras.py DIRECTORY STEPS VICTIM KILL_STEP [SETTING=VALUE ...]
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

import hvd_slowmo.tf as slowmo

directory, steps, victim, kill_step = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
settings = {name: json.loads(value) for name, value in (pair.split("=") for pair in sys.argv[5:])}
slowmo.init()
host = os.environ["HOROVOD_HOSTNAME"]
keras.utils.set_random_seed(hvd.rank())
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
optimizer = slowmo.SlowMo(keras.optimizers.SGD(0.01), **settings)


@slowmo.elastic.run
def train(state):
    @tf.function  # with the present workers in its trace
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - tf.reduce_sum(x, axis=1, keepdims=True)))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    while state.batch < steps:
        if host == victim and state.batch == kill_step:
            os.kill(os.getpid(), signal.SIGKILL)
        step(tf.random.normal((16, 8)))
        state.batch += 1
        time.sleep(0.02)
        state.commit()
    optimizer.join(model)


state = slowmo.elastic.State(model, optimizer, batch=0)
train(state)
seen = {
    "size": hvd.size(),
    "steps": optimizer.steps,
    "parameters": [v.numpy().tolist() for v in model.trainable_variables],
    "changes": [change._asdict() for change in state.changes],
}
(directory / f"{host}.json").write_text(json.dumps(seen))
