"""An ordinary Keras training script. The lines that SlowMo adds end in `# SlowMo`.

Run it with: horovodrun -np 2 python examples/minimal_keras.py
Or on a single worker: python examples/minimal_keras.py
"""

import horovod.tensorflow as hvd  # SlowMo
import keras
import numpy as np

import hvd_slowmo.tf as slowmo  # SlowMo

hvd.init()  # SlowMo
points = np.random.default_rng(0).normal(size=(5120, 2)).astype("float32")
inside = (np.linalg.norm(points, axis=1) < 1).astype("float32")  # to be learnt: does a point lie inside the circle?
train_points, train_inside = points[1024:], inside[1024:]
test_points, test_inside = points[:1024], inside[:1024]
train_points = train_points[hvd.rank() :: hvd.size()]  # SlowMo
train_inside = train_inside[hvd.rank() :: hvd.size()]  # SlowMo

layers = [keras.Input((2,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(1, "sigmoid")]
model = keras.Sequential(layers)
optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
optimizer = slowmo.SlowMo(optimizer, slowmo.SlowMoConfig(tau=12, beta=0.5))  # SlowMo
model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"])

model.fit(
    train_points,
    train_inside,
    epochs=10,
    validation_data=(test_points, test_inside),
    callbacks=[slowmo.SlowMoCallback()],  # SlowMo
    verbose=2 if hvd.rank() == 0 else 0,  # SlowMo
)
