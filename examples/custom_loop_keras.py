"""A custom training loop in Keras: GradientTape, broadcast, apply, join. The lines that SlowMo adds end in `# SlowMo`.

Run it with: horovodrun -np 2 python examples/custom_loop_keras.py
Or on a single worker: python examples/custom_loop_keras.py
"""

import horovod.tensorflow as hvd  # SlowMo
import keras
import numpy as np
import tensorflow as tf

import hvd_slowmo.tf as slowmo  # SlowMo

hvd.init()  # SlowMo
points = np.random.default_rng(0).normal(size=(5120, 2)).astype("float32")
inside = (np.linalg.norm(points, axis=1, keepdims=True) < 1).astype("float32")
test_points, test_inside = points[:1024], inside[:1024]
data = tf.data.Dataset.from_tensor_slices((points[1024:], inside[1024:]))
data = data.shard(hvd.size(), hvd.rank())  # SlowMo
data = data.shuffle(4096).batch(32)

layers = [keras.Input((2,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(1)]
model = keras.Sequential(layers)
loss_of = keras.losses.BinaryCrossentropy(from_logits=True)
optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
optimizer = slowmo.SlowMo(optimizer, slowmo.SlowMoConfig(tau=12, beta=0.5))  # SlowMo
optimizer.broadcast(model.variables)  # SlowMo


@tf.function
def train(batch, target):
    with tf.GradientTape() as tape:
        loss = loss_of(target, model(batch, training=True))
    optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
    return loss


for epoch in range(10):
    for batch, target in data:  # workers may have different numbers of batches
        loss = train(batch, target)
    optimizer.join()  # SlowMo
    if hvd.rank() == 0:  # SlowMo
        accuracy = np.mean((model(test_points) > 0) == (test_inside > 0))
        print(f"epoch {epoch + 1}: loss of the last batch {loss:.3f}, test accuracy {100 * accuracy:.1f} %")
